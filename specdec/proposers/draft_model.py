"""Drafts from a smaller language model, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.adaptive import AdaptiveLength
from specdec.models import Cache, LanguageModel, prefill
from specdec.proposers.chain import draw_chain
from specdec.proposers.ngram import pad
from specdec.randomness import UniformSource, uniforms
from specdec.requests import Batch, Generation
from specdec.verification import Draft


@dataclass(slots=True)
class _Slot:
    """What a cache slot was fed: num_committed of the owner's tokens, then `drafted` tokens that may be rejected."""

    owner: Generation | None = None
    num_committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def num_valid(self, row: Generation) -> int:
        """How many leading tokens of the row the cache already holds; at least one token is left to feed."""
        if self.owner is not row:
            return 0
        valid = self.num_committed
        for token in self.drafted:
            if valid >= len(row.tokens) or row.tokens[valid] != token:
                break
            valid += 1
        return min(valid, len(row.tokens) - 1)


class DraftModelProposer:
    """A draft model with its own ragged cache.

    The cache is kept in step by comparison: what a slot holds is valid as far as it agrees with the committed tokens.
    This covers rejection (the rejected tail is overwritten), full acceptance (the last draft token was never fed, and
    is fed now with the bonus token) and a slot that changed hands (nothing is valid).
    """

    def __init__(
        self, model: LanguageModel, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        self._model, self._uniforms, self._adaptive = model, uniforms, adaptive
        self._cache: Cache | None = None
        self._slots: list[_Slot] = []

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        limits = [
            max(0, min(limit, self._model.context_length - length))
            for limit, length in zip(limits, batch.lengths(), strict=True)
        ]
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._model.vocab_size, self._model.device)
        cache = self._reserve(batch)

        def logits_after(drafted: Tensor) -> Tensor:
            return self._feed(drafted[:, -1:], cache) if drafted.shape[1] else self._catch_up(batch, cache)

        draft = draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive)
        if draft.tokens.shape[1] == 0:
            return draft  # nothing was fed
        for slot, row, fed in zip(self._slots, batch.rows, draft.tokens[:, :-1].tolist(), strict=False):
            slot.owner, slot.num_committed, slot.drafted = row, len(row.tokens) if row else 0, fed
        return draft

    def _reserve(self, batch: Batch) -> Cache:
        if self._cache is None or self._cache.capacity < batch.capacity or len(self._slots) < batch.num_slots:
            self._cache = self._model.allocate(batch.num_slots, batch.capacity)
            self._slots = [_Slot() for _ in range(batch.num_slots)]
        return self._cache

    def _catch_up(self, batch: Batch, cache: Cache) -> Tensor:
        """Feed each row the committed tokens its slot lacks; returns the logits after the last, [rows, 1, vocab]."""
        pending = []
        for index, (slot, row) in enumerate(zip(self._slots, batch.rows, strict=False)):
            cache.lengths[index] = slot.num_valid(row) if row else 0
            if row and cache.lengths[index] == 0 and len(row.tokens) > 1:
                prefill(self._model, row.tokens[:-1], cache, index)
            pending.append(row.tokens[cache.lengths[index] :] if row else [0])
        tokens, lengths = pad(pending, self._model.device)
        logits = self._model.forward(tokens, cache)
        for index, fed in enumerate(pending):
            cache.lengths[index] += len(fed)
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, logits.shape[-1])
        return logits.gather(1, last)

    def _feed(self, tokens: Tensor, cache: Cache) -> Tensor:
        logits = self._model.forward(tokens, cache)
        for index in range(len(tokens)):
            cache.lengths[index] += 1
        return logits
