"""Bugs of constraints. They do something only where a request has one, so `MUTANTS` does not list them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from specdec.conformance.mutants.planting import BrokenLoop
from specdec.constraints.progress import Progress, masks
from specdec.proposers.draft_model import DraftModelProposer
from specdec.requests import Batch, Generation
from specdec.sampling.distributions import Dense
from specdec.sampling.state import SamplingState
from specdec.verification import (
    Draft,
    Verification,
)


def unconstrained(batch: Batch) -> Batch:
    """A batch without constraints."""
    sampling = batch.sampling
    free = SamplingState(
        sampling.params,
        [row.request.prompt if row else () for row in batch.rows],
        [row.output if row else () for row in batch.rows],
        sampling.vocab_size,
        sampling.device,
        coupled=sampling.rows.coupled,
    )
    return replace(batch, sampling=free)


class UnconstrainedTarget(BrokenLoop):
    """The constraint is applied to the draft only."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        return super()._verify(unconstrained(batch), logits, draft)


class UnconstrainedDraft(DraftModelProposer):
    """Not a bug: the constraint applies to the target only, and the draft declares the distribution it used."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        return super().propose(unconstrained(batch), limits)


class UnconstrainedDraw(UnconstrainedDraft):
    """Declares the constrained distribution but samples without the constraint."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft, rows = super().propose(batch, limits), [row.progress if row else None for row in batch.rows]
        if not draft.tokens.shape[1]:
            return draft
        allowed = masks(rows, draft.tokens[:, :-1], draft.tokens.shape[1], draft.distribution.vocab_size)
        probs = draft.distribution.dense() * allowed.to(draft.tokens.device)
        return replace(draft, distribution=Dense(probs / probs.sum(-1, keepdim=True)))


class _KeepsRejected(Progress):
    """Continues from the end of the last draft although part of it was rejected."""

    def emit(self, tokens: Sequence[int]) -> None:
        longest = max(map(len, self._states))
        drafted = next(list(text) for text in self._states if len(text) == longest)
        super().emit(tokens if list(tokens[: len(drafted)]) == drafted else [*drafted, *tokens[-1:]])


class ConstraintNotRolledBack(BrokenLoop):
    """Rejected tokens remain in a row's progress."""

    def _prefill(self, row: Generation, cache: Any, slot: int) -> None:
        super()._prefill(row, cache, slot)
        if row.progress:
            row.progress.__class__ = _KeepsRejected
