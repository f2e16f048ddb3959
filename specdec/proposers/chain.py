"""Draws a draft token by token, each from its distribution given the previous ones.

`ChainProposer` is also the base of the proposers that draw trees, see `specdec.proposers.tree`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_columns

from specdec.device_rows import RowState
from specdec.proposers.adaptive import AdaptiveLength, confidence
from specdec.proposers.base import FixedProposer
from specdec.proposers.tree import LogitsAt, draw_fixed_tree
from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace
from specdec.sampling.distributions import Distribution, stack_distributions
from specdec.sampling.randomness import Role, UniformSource, noise
from specdec.sampling.state import RowParams
from specdec.verification import Draft


@dataclass(frozen=True, slots=True)
class Pending:
    """The newest tokens of each row, which are missing in the draft's cache.

    tokens: int64 [rows, n]; the first num[r] of row r are real (at least one in a busy row), the rest is padding.
    starts: int64 [rows], their first column in the cache.
    """

    tokens: Tensor
    num: Tensor
    starts: Tensor

    @property
    def ends(self) -> Tensor:
        """The columns after them, int64 [rows]."""
        return self.starts + self.num


def with_masks(tokens: Tensor, lengths: Tensor, num_masks: int, mask_token: int) -> tuple[Tensor, Tensor]:
    """The first lengths[r] tokens of row r, int64 [rows, n], and mask tokens after them: int64 [rows, n + num_masks].

    Also returns where the row's own tokens are, bool of the same shape.
    """
    tokens = pad_columns(tokens, (0, num_masks))
    is_own = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    return torch.where(is_own, tokens, mask_token), is_own


class ChainProposer(FixedProposer):
    """A FixedProposer that draws chains or trees with a model; if steps are recorded, a draft is a single recording.

    max_pending: maximum number of pending tokens per row in a recorded draft; None for as many as a step emits.
    num_before: number of leading tokens that are not stored in the cache.
    """

    max_pending: int | None
    num_before: int = 0
    _uniforms: UniformSource
    _adaptive: AdaptiveLength | None
    _vocabulary: Tensor | None

    @abstractmethod
    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        """The function for `draw_fixed` that returns logits after the pending tokens and the draft so far."""

    def logits_at(self, pending: Pending, extent: int, *inputs: Any) -> LogitsAt:
        """The same for `draw_fixed_tree`, of a proposer that has a tree."""
        raise NotImplementedError(f"{type(self).__name__} draws chains only")

    @property
    def is_fixed(self) -> bool:
        return self._adaptive is None

    def draft_from(
        self, state: RowState, rows: RowParams, num_tokens: int, extent: int, *inputs: Any
    ) -> tuple[Tensor, Distribution, Tensor]:
        starts = state.num_tokens - self.num_before - state.num_pending
        pending = Pending(state.pending[:, : self.max_pending], state.num_pending, starts)
        return self._draw(pending, state.num_tokens, rows, num_tokens, extent, *inputs)

    def _draw(
        self, pending: Pending, origins: Tensor, rows: RowParams, num_tokens: int, extent: int, *inputs: Any
    ) -> tuple[Tensor, Distribution, Tensor]:
        if self.tree:
            logits_at = self.logits_at(pending, extent, *inputs)
            return draw_fixed_tree(rows, origins, self.tree, logits_at, self._uniforms, self._vocabulary)
        logits_after = self.logits_after(pending, extent, *inputs)
        return draw_fixed(rows, origins, num_tokens, logits_after, self._uniforms, self._vocabulary)

    def _record(
        self, batch: Batch, limits: Sequence[int], pending: Sequence[Sequence[int]], cache: Any, starts: Sequence[int]
    ) -> Draft:
        """Draw the whole draft in a single recording. limits: in levels, for a tree. pending, starts: see `Pending`."""
        assert batch.recording
        recorder, max_pending = batch.recording, self.max_pending or batch.max_draft + 1
        num_proposed = [self.tree.num_within(limit) for limit in limits] if self.tree else limits
        columns = [
            [*numbers, len(tokens), *tokens, *[0] * (max_pending - len(tokens))]
            for *numbers, tokens in zip(batch.num_tokens(), num_proposed, starts, pending, strict=True)
        ]
        uploaded, params = recorder.upload(columns), recorder.place(batch.sampling.rows)
        extent = cache.reserve(0, starts, max_pending + batch.max_draft)
        return recorder(self._drafted, uploaded, params, batch.max_draft, extent, *self.inputs(batch))

    def _drafted(
        self, uploaded: InPlace[Tensor], params: InPlace[RowParams], num_tokens: int, extent: int, *inputs: Any
    ) -> Draft:
        """A draft as a pure function of tensors.

        uploaded: int64 [rows, 4 + n], each row's number of tokens, number of draft tokens to propose, and `Pending`.
        """
        origins, num_proposed, starts, num_pending = uploaded.value[:, :4].unbind(1)
        pending = Pending(uploaded.value[:, 4:], num_pending, starts)
        tokens, distribution, finite = self._draw(pending, origins, params.value, num_tokens, extent, *inputs)
        return Draft(tokens, num_proposed, distribution, self.tree, finite)


def draw_chain(
    batch: Batch,
    limits: Sequence[int],
    logits_after: Callable[[Tensor], Tensor],
    uniforms: UniformSource,
    adaptive: AdaptiveLength | None = None,
    vocabulary: Tensor | None = None,
    acceptance: Callable[[Tensor], Tensor | None] = lambda drafted: None,
) -> Draft:
    """A draft of up to limits[r] tokens for row r, drawn with the rows' own sampling parameters.

    logits_after: maps the draft so far, int64 [rows, i] with i increasing by one per call, to the logits of the next
    token, [rows, 1, vocab]. adaptive: ends the draft when another token is not worth its cost. vocabulary: int64,
    ascending, the tokens of the logits' columns, or None for all. acceptance: maps the same drafts to the probability,
    float [rows], that the next token will be accepted; None for its distribution's largest one.
    """
    device, num_proposed = batch.sampling.device, list(limits)
    draws = draft_uniforms(batch.sampling.rows, upload(batch.num_tokens(), device), max(limits), uniforms)
    drafted = torch.empty(len(batch.rows), 0, dtype=torch.int64, device=device)
    busy, reach = [slot for slot, row in enumerate(batch.rows) if row], [1.0] * len(num_proposed)
    distributions: list[Distribution] = []
    finite: list[Tensor] = []
    for i in range(max(limits)):
        if adaptive:
            pays = adaptive.pays([reach[slot] if num_proposed[slot] > i else 0.0 for slot in busy], i)
            for slot, more in zip(busy, pays, strict=True):
                if not more:
                    num_proposed[slot] = min(num_proposed[slot], i)
            if max(num_proposed) <= i:
                break
        logits = logits_after(drafted)
        expected = acceptance(drafted) if adaptive else None
        distribution, is_finite = batch.sampling.distribution(logits, drafted, vocabulary, of_draft=True)
        distributions.append(distribution[:, 0])
        finite.append(is_finite)
        drafted = torch.cat([drafted, distributions[-1].draw(draws[:, i]).unsqueeze(1)], 1)
        if adaptive:
            sureness = confidence(logits[:, 0]) if expected is None else expected
            reach = [a * b for a, b in zip(reach, sureness.tolist(), strict=True)]
    if not distributions:
        return Draft.empty(len(batch.rows), batch.sampling.vocab_size, device)
    proposed = upload(num_proposed, device)
    return Draft(drafted, proposed, stack_distributions(distributions), finite=torch.cat(finite, 1))


def draw_fixed(
    rows: RowParams,
    origins: Tensor,
    num_tokens: int,
    logits_after: Callable[[Tensor], Tensor],
    uniforms: UniformSource,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Distribution, Tensor]:
    """`draw_chain` as a pure function of tensors, which can be recorded: all rows draft num_tokens.

    origins: int64 [rows], positions of the drafts.
    Returns tokens int64 [rows, k], their distributions [rows, k], and whether these are valid, bool [rows, k].
    """
    draws = draft_uniforms(rows, origins, num_tokens, uniforms)
    drafted = origins.new_empty(len(origins), 0)
    distributions, finite = [], []
    for i in range(num_tokens):
        distribution, is_distribution = rows.distribution(logits_after(drafted), vocabulary, of_draft=True)
        distributions.append(distribution[:, 0])
        finite.append(is_distribution)
        drafted = torch.cat([drafted, distributions[-1].draw(draws[:, i]).unsqueeze(1)], 1)
    return drafted, stack_distributions(distributions), torch.cat(finite, 1)


def draft_uniforms(rows: RowParams, origins: Tensor, num_tokens: int, uniforms: UniformSource) -> Tensor:
    """Uniforms to draw a draft, float64 [rows, num_tokens]; zeros if all rows are greedy.

    Coupled rows have one per token of the vocabulary, shared with the target: float64 [rows, num_tokens, vocab].
    """
    if rows.all_greedy:
        return torch.zeros(len(origins), num_tokens, dtype=torch.float64, device=origins.device)
    origins = origins.unsqueeze(1)
    positions = origins + torch.arange(num_tokens, device=origins.device)
    if rows.coupled:
        return noise(rows.seeds, positions, rows.vocab_size, uniforms)
    roles = torch.full_like(positions, Role.DRAFT)
    return uniforms(rows.seeds.unsqueeze(1), positions, roles, origins)
