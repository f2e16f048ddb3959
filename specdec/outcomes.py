"""The outcome of a decode step: packed for one transfer on the device, read by the host, and recorded in its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.requests import Generation, Step
from specdec.runtime.devices import upload
from specdec.sampling.state import NonFiniteLogitsError
from specdec.trees.shape import Tree
from specdec.verification import Draft, Verification


class Transfer(Protocol):
    """The columns of a `Packed`, being copied to the host; reading them waits for the copy."""

    def tolist(self) -> list[list[int]]: ...


class RowOutcome(NamedTuple):
    """The outcome of a row's step, as read by the host.

    moments_ns: device clock between the phases, if recorded. tokens: the draft's. path: for a tree, the accepted nodes
    first. counts: number of tokens proposed, number accepted, and the token after them.
    draft_finite, target_finite: 1 for each valid distribution, 0 for one from logits without a distribution.
    """

    moments_ns: list[int]
    tokens: list[int]
    path: list[int]
    counts: list[int]
    draft_finite: list[int]
    target_finite: list[int]


@dataclass(frozen=True, slots=True)
class Packed:
    """The fields of a `RowOutcome` for all rows in one tensor, for a single transfer to the host.

    columns: int64 [rows, n]. widths: number of columns of each field.
    """

    columns: Tensor
    widths: tuple[int, ...]

    @classmethod
    def of(cls, draft: Draft, outcome: Verification, finite: Tensor, moments_ns: Sequence[Tensor] = ()) -> Packed:
        """finite: whether the target's distributions are valid, bool [rows, k + 1]. moments_ns: int64 [1] each."""
        empty = draft.tokens[:, :0]
        parts = (
            torch.cat([*moments_ns]).expand(len(draft.tokens), -1) if moments_ns else empty,
            draft.tokens,
            empty if outcome.path is None else outcome.path,
            torch.stack([draft.num_proposed, outcome.accepted, outcome.next_token], 1),
            empty if draft.finite is None else draft.finite.long(),
            finite.long(),
        )
        return cls(torch.cat(parts, 1), tuple(part.shape[1] for part in parts))


def unpacked(columns: Sequence[int], widths: Sequence[int]) -> RowOutcome:
    """Unpack a row of a `Packed`."""
    ends = [*accumulate(widths)]
    return RowOutcome(*([*columns[end - width : end]] for end, width in zip(ends, widths, strict=True)))


def check_distributions(row: Generation, index: int, outcome: RowOutcome, tree: Tree | None) -> None:
    """Raise NonFiniteLogitsError, naming request and step, for logits without a distribution."""
    if all(outcome.draft_finite) and all(outcome.target_finite):
        return
    is_draft = not all(outcome.draft_finite)
    owner, finite = ("the draft model's", outcome.draft_finite) if is_draft else ("the target's", outcome.target_finite)
    position = finite.index(0)
    if tree:  # convert to a level: the draft has one distribution per parent, the target one per node
        position = (0, *tree.depths)[tree.families[position] + 1 if is_draft else position]
    raise NonFiniteLogitsError(
        index,
        position,
        f"{owner} request {row.request.index} at token position {len(row.tokens) + position} "
        f"(decode step {len(row.steps) + 1})",
    )


def step_record(num_drafted: int, accepted: Sequence[int], num_kept: int, tree: Tree | None) -> Step:
    """The record of a step that accepted the draft tokens at these indices and drew one more; num_kept were emitted."""
    depth = tree.depths[num_drafted - 1] if tree and num_drafted else None
    if num_kept <= len(accepted):
        return Step(num_drafted, num_kept, None, depth)
    end = accepted[-1] if accepted else -1
    is_last = not tree.num_children(end, num_drafted) if tree else len(accepted) == num_drafted
    return Step(num_drafted, len(accepted), "bonus" if is_last else "recovered", depth)


def add_logprobs(row: Generation, logits: Tensor, positions: Sequence[int], tokens: Sequence[int]) -> None:
    """Add the log-softmax of unprocessed logits [width, vocab] at the tokens and their positions."""
    logprobs = logits[upload(positions[: len(tokens)], logits.device)].double().log_softmax(-1)
    row.logprobs += logprobs.gather(1, upload(tokens, logits.device).unsqueeze(1)).squeeze(1).tolist()
    if num_top := min(row.request.sampling.top_logprobs, logits.shape[-1]):
        values, indices = logprobs.topk(num_top, -1)
        pairs = zip(indices.tolist(), values.tolist(), strict=True)
        row.top_logprobs += [dict(zip(*pair, strict=True)) for pair in pairs]
