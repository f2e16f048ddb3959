"""Drafts from a head on the target's features, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.adaptive import AdaptiveLength
from specdec.cache import RaggedCache
from specdec.models import PREFILL_CHUNK
from specdec.models.eagle import EagleHead
from specdec.proposers.chain import draw_chain
from specdec.proposers.ngram import pad
from specdec.randomness import UniformSource, uniforms
from specdec.requests import Batch, Generation
from specdec.verification import Draft


class EagleProposer:
    """An EagleHead with its own ragged cache.

    The cache holds what was computed from the target's features; what was computed from guessed ones while drafting
    is overwritten at the next step, accepted or not.
    """

    needs_features = True

    def __init__(
        self, head: EagleHead, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        self._head, self._uniforms, self._adaptive = head, uniforms, adaptive
        self._cache: RaggedCache | None = None
        self._owners: list[tuple[Generation | None, int]] = []  # of each slot, and how much of the cache is valid

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._head.vocab_size, self._head.device)
        cache = self._reserve(batch)
        guessed: Tensor

        def logits_after(drafted: Tensor) -> Tensor:
            nonlocal guessed
            if drafted.shape[1]:
                guessed = self._head(guessed, drafted[:, -1:], cache)
                cache.lengths[: len(batch.rows)] = [length + 1 for length in cache.lengths[: len(batch.rows)]]
            else:
                guessed = self._catch_up(batch, max(limits) + 1, cache)
            return self._head.logits(guessed)

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive, self._head.draft_vocabulary)

    def _reserve(self, batch: Batch) -> RaggedCache:
        if self._cache is None or self._cache.capacity < batch.capacity or len(self._owners) < batch.num_slots:
            self._cache = self._head.allocate(batch.num_slots, batch.capacity)
            self._owners = [(None, 0)] * batch.num_slots
        return self._cache

    def _catch_up(self, batch: Batch, longest: int, cache: RaggedCache) -> Tensor:
        """Feed each row the committed tokens it lacks; returns the feature guessed for the last, [rows, 1, hidden].

        longest: tokens that are fed to all rows at once at the most; a row that lacks more is fed before, alone.
        """
        assert batch.features is not None
        pending: list[list[int]] = []
        for slot, row in enumerate(batch.rows):
            owner, valid = self._owners[slot]
            cache.lengths[slot] = valid if row and owner is row else 0
            if row and len(row.tokens) - 1 - cache.lengths[slot] > longest:
                self._feed_alone(row.tokens[:-1], batch.features, cache, slot)
            pending.append(row.tokens[cache.lengths[slot] + 1 :] if row else [])
            self._owners[slot] = (row, len(row.tokens) - 1 if row else 0)
        tokens, lengths = pad(pending, self._head.device)
        rows = torch.arange(len(pending), device=tokens.device)
        places = torch.tensor(cache.lengths[: len(pending)], device=tokens.device)[:, None]
        places = places + torch.arange(tokens.shape[1], device=tokens.device)
        guessed: Tensor = self._head(batch.features[rows[:, None], places], tokens, cache)
        for slot, fed in enumerate(pending):
            cache.lengths[slot] += len(fed)
        return guessed[rows, (lengths - 1).clamp(min=0)].unsqueeze(1)

    def _feed_alone(self, tokens: list[int], features: Tensor, cache: RaggedCache, slot: int) -> None:
        """Feed one row these tokens, in chunks."""
        for start in range(cache.lengths[slot], len(tokens) - 1, PREFILL_CHUNK):
            chunk = torch.tensor([tokens[start + 1 : start + 1 + PREFILL_CHUNK]], device=self._head.device)
            self._head(features[slot, start : start + chunk.shape[1]].unsqueeze(0), chunk, cache, slot)
            cache.lengths[slot] += chunk.shape[1]
