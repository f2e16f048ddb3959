"""Forced acceptance patterns, to test the state that an engine keeps. The output does NOT follow the target's
distribution.

Caches, recurrent states, features and counts are rolled back by how many draft tokens are accepted, and the usual
acceptance rates may hide that one number of them is handled wrongly: a draft that is always accepted never tests a
rollback. Here each step accepts a prescribed number of draft tokens, whatever they are.

The token after them is still the target's own: it is drawn from the target's distribution given all tokens before it,
with the noise of coupled verification, which depends on seed and position only. So two things must hold whatever the
pattern, and `specdec.conformance.states` checks them:
    - with "none" the output is that of plain decoding with verification "coupled", token for token;
    - with any pattern, the logits at each emitted token are those of the target reading the same tokens afresh, without
      any draft, rollback or cache of an earlier step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.decoding import Decoder
from specdec.requests import Batch
from specdec.runtime.checks import require
from specdec.runtime.devices import upload
from specdec.verification import Draft, Verification, verify_coupled

NAMED_PATTERNS: dict[str, tuple[int | None, ...]] = {"all": (None,), "none": (0,), "alternating": (None, 0)}


def as_pattern(value: str | Sequence[int]) -> tuple[int | None, ...]:
    """The numbers of draft tokens that a row's steps accept, in turn; None stands for all.

    value: a name in `NAMED_PATTERNS`, or numbers at least 0. Raises ValueError for anything else.
    """
    given: Any = value if isinstance(value, Iterable) else ()
    pattern: Any = NAMED_PATTERNS.get(value, ()) if isinstance(value, str) else tuple(given)
    require(
        len(pattern) > 0 and (isinstance(value, str) or all(type(count) is int and count >= 0 for count in pattern)),
        f"forced_acceptance={value!r} must be {', '.join(map(repr, NAMED_PATTERNS))}, or the numbers of draft tokens "
        "that steps accept in turn, such as [3, 0, 1]",
    )
    return tuple(pattern)


class ForcedDecoder(Decoder):
    """A decoder whose rows accept draft tokens by a pattern: step i of a row as many as pattern[i], in turn.

    A step accepts all its draft tokens if it has fewer. The pattern of a row does not depend on its batch mates.
    """

    runs_ahead = False  # the host counts the steps of a row

    def __init__(self, *args: Any, pattern: Sequence[int | None], **options: Any) -> None:
        super().__init__(*args, **options | {"rule": verify_coupled})
        self.pattern = tuple(pattern)

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        """Accept by the pattern; the next token is drawn from the target's distribution, not from a residual."""
        width, device = draft.tokens.shape[1], logits.device
        counts = [self.pattern[len(row.steps) % len(self.pattern)] if row else 0 for row in batch.rows]
        forced = upload([width if count is None else count for count in counts], device)
        accepted = torch.minimum(forced, draft.num_proposed)
        distribution, finite = batch.sampling.distribution(logits, draft.tokens)
        _, noise = self._draws(batch.sampling.rows, upload(batch.num_tokens(), device), draft)
        drawn = distribution.draw(noise)
        return Verification(accepted, drawn.gather(1, accepted.unsqueeze(1)).squeeze(1)), finite
