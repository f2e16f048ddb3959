"""A proposer whose head has a cache of its own, which is kept in step with the target's features."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from specdec.models.base import PREFILL_CHUNK
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import ChainProposer
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace
from specdec.sampling.randomness import UniformSource


class HeadProposer(ChainProposer):
    """A head with a cache: entry i is made of the target's features of position i, and of the token after it.

    What a draft leaves in the cache is overwritten at the next step, accepted or not.
    """

    context_length = 1 << 30  # no limit of its own
    max_pending: int | None = None
    num_before = 1  # the features before a row's newest token are the last ones known

    def __init__(self, head: Any, uniforms: UniformSource, adaptive: AdaptiveLength | None) -> None:
        self._head, self._uniforms, self._adaptive = head, uniforms, adaptive
        self.feature_layers = head.feature_layers
        self._vocabulary = head.draft_vocabulary if len(head.draft_vocabulary) < head.vocab_size else None
        self._cache: Any = None
        self._owners: list[tuple[Generation | None, int]] = []  # of each slot, and how much of the cache is valid

    @abstractmethod
    def _feed(self, features: Tensor, tokens: Tensor, slot: int) -> None:
        """Enter features [1, n, width] and the tokens after them, int64 [1, n], after what a slot holds."""

    def enter(self, batch: Batch, slot: int) -> list[int]:
        self._reserve(batch)
        return self._lacking(batch, slot, self.max_pending or batch.max_draft + 1)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        assert batch.features is not None
        return self._cache, InPlace(batch.features)

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return accepted + 1  # all that a step emits: their features have only become known in it

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        self._owners[slot] = (row, length - 1)

    def _reserve(self, batch: Batch, extra: int = 0) -> None:
        """extra: places beyond what a slot must be able to hold."""
        capacity = batch.capacity + extra
        if self._cache is None or self._cache.capacity < capacity or len(self._owners) < batch.num_slots:
            self._cache = None  # before there is another
            self._cache = self._head.allocate(batch.num_slots, capacity)
            self._owners = [(None, 0)] * batch.num_slots

    def _pending(self, batch: Batch, longest: int) -> list[list[int]]:
        """The committed tokens that each row lacks; a row that lacks more than `longest` is fed all but one now."""
        return [self._lacking(batch, slot, longest) for slot in range(len(batch.rows))]

    def _lacking(self, batch: Batch, slot: int, longest: int) -> list[int]:
        """The same for one slot, to which they are taken to be fed next."""
        assert batch.features is not None
        row, (owner, valid) = batch.rows[slot], self._owners[slot]
        self._cache.num_cached[slot] = valid if row and owner is row else 0
        self._owners[slot] = (row, len(row.tokens) - 1 if row else 0)
        if row is None:
            return []
        if len(row.tokens) - 1 - self._cache.num_cached[slot] > longest:
            self._feed_alone(row.tokens[:-1], batch.features, slot)
        return row.tokens[self._cache.num_cached[slot] + 1 :]

    def _feed_alone(self, tokens: list[int], features: Tensor, slot: int) -> None:
        """Feed one row these tokens, in chunks."""
        cache = self._cache
        for start in range(cache.num_cached[slot], len(tokens) - 1, PREFILL_CHUNK):
            chunk = upload([tokens[start + 1 : start + 1 + PREFILL_CHUNK]], self._head.device)
            self._feed(features[slot, start : start + chunk.shape[1]].unsqueeze(0), chunk, slot)
            cache.num_cached[slot] += chunk.shape[1]


def features_at(features: Tensor, starts: Tensor, width: int) -> Tensor:
    """Features [slots, capacity, hidden] from starts[r] on, int64 [rows] -> [rows, width, hidden]."""
    rows = torch.arange(len(starts), device=starts.device)
    places = starts[:, None] + torch.arange(width, device=starts.device)
    return features[rows[:, None], places.clamp(max=features.shape[1] - 1)]  # padding may stand beyond the end
