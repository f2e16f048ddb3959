"""Drafts from a sequential head, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.base import SequentialHead
from specdec.models.base import PREFILL_CHUNK
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import ChainProposer, Pending, draw_chain
from specdec.proposers.ngram import pad
from specdec.proposers.tree import Level, draw_tree
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.trees.shape import Tree
from specdec.verification import Draft


class EagleProposer(ChainProposer):
    """A SequentialHead with a cache of its own: EAGLE, EAGLE-3 and MTP.

    The cache holds what was computed from the target's features; what was computed from the head's own states while
    drafting is overwritten at the next step, accepted or not. tree: the shape of its drafts; None draws chains.
    """

    context_length = 1 << 30  # no limit of its own
    max_pending = None
    num_before = 1  # the first token has no previous feature

    def __init__(
        self,
        head: SequentialHead,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
        tree: Tree | None = None,
    ) -> None:
        self._head, self._uniforms, self._adaptive, self._tree = head, uniforms, adaptive, tree
        self.feature_layers = head.feature_layers
        self._vocabulary = head.draft_vocabulary if len(head.draft_vocabulary) < head.vocab_size else None
        self._cache: Any = None
        self._owners: list[tuple[Generation | None, int]] = []  # of each slot: its row, and the number of valid entries

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._head.vocab_size, self._head.device)
        self._reserve(batch)
        if self._tree:
            return self._branching(batch, limits, self._tree)
        if batch.recording and not self._adaptive:
            pending = self._pending(batch, batch.max_draft + 1)
            return self._record(batch, limits, pending, self._cache, self._cache.num_cached[: len(batch.rows)])
        return self._drawn(batch, limits)

    @property
    def is_fixed(self) -> bool:
        return self._adaptive is None and self._tree is None

    def enter(self, batch: Batch, slot: int) -> list[int]:
        self._reserve(batch)
        return self._lacking(batch, slot, batch.max_draft + 1)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        assert batch.features is not None
        return self._cache, InPlace(batch.features)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache, features), head, states = inputs, self._head, torch.empty(0)

        def logits(drafted: Tensor) -> Tensor:
            nonlocal states
            if drafted.shape[1]:
                states = head.forward_at(states, drafted[:, -1:], pending.ends + drafted.shape[1] - 1, cache, extent)
            else:
                known = head.encode(_features_at(features.value, pending.starts, pending.tokens.shape[1]))
                states = _last(head.forward_at(known, pending.tokens, pending.starts, cache, extent), pending.num)
            return head.logits(states)

        return logits

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return accepted + 1  # all emitted tokens: the target computed their features in this step

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        self._owners[slot] = (row, length - 1)

    def _reserve(self, batch: Batch) -> None:
        if self._cache is None or self._cache.capacity < batch.capacity or len(self._owners) < batch.num_slots:
            self._cache = None  # free the memory before allocating
            self._cache = self._head.allocate(batch.num_slots, batch.capacity)
            self._owners = [(None, 0)] * batch.num_slots

    def _drawn(self, batch: Batch, limits: Sequence[int]) -> Draft:
        cache, states = self._cache, torch.empty(0)

        def logits_after(drafted: Tensor) -> Tensor:
            nonlocal states
            if drafted.shape[1]:
                states = self._head.forward(states, drafted[:, -1:], cache)
                cache.num_cached[: len(batch.rows)] = [length + 1 for length in cache.num_cached[: len(batch.rows)]]
            else:
                states = self._catch_up(batch, max(limits) + 1)
            return self._head.logits(states)

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive, self._vocabulary)

    def _branching(self, batch: Batch, limits: Sequence[int], tree: Tree) -> Draft:
        """A tree, each level fed with the states of its parents' parents."""
        states = torch.empty(0)

        def logits_at(level: Level, parents: Tensor) -> Tensor:
            nonlocal states
            if level.number:
                above = states[:, level.above]
                states = self._head.forward(above, parents, self._cache, branches=level.branches)
            else:
                states = self._catch_up(batch, tree.depth + 1)
            return self._head.logits(states)

        return draw_tree(batch, limits, tree, logits_at, self._uniforms, self._vocabulary)

    def _pending(self, batch: Batch, longest: int) -> list[list[int]]:
        """The committed tokens that each row lacks; if more than `longest`, feeds all but one now."""
        return [self._lacking(batch, slot, longest) for slot in range(len(batch.rows))]

    def _lacking(self, batch: Batch, slot: int, longest: int) -> list[int]:
        """`_pending` for one slot, assuming that the result is fed next."""
        assert batch.features is not None
        row, (owner, valid) = batch.rows[slot], self._owners[slot]
        self._cache.num_cached[slot] = valid if row and owner is row else 0
        self._owners[slot] = (row, len(row.tokens) - 1 if row else 0)
        if row is None:
            return []
        if len(row.tokens) - 1 - self._cache.num_cached[slot] > longest:
            self._feed_alone(row.tokens[:-1], batch.features, slot)
        return row.tokens[self._cache.num_cached[slot] + 1 :]

    def _catch_up(self, batch: Batch, longest: int) -> Tensor:
        """Feed each row the committed tokens it lacks; returns the state after the last, [rows, 1, width].

        longest: maximum tokens per row in the joint call; a row that lacks more is first fed alone.
        """
        assert batch.features is not None
        cache, pending = self._cache, self._pending(batch, longest)
        tokens, lengths = pad(pending, self._head.device)
        starts = upload(cache.num_cached[: len(pending)], tokens.device)
        known = self._head.encode(_features_at(batch.features, starts, tokens.shape[1]))
        states = self._head.forward(known, tokens, cache)
        for slot, fed in enumerate(pending):
            cache.num_cached[slot] += len(fed)
        return _last(states, lengths)

    def _feed_alone(self, tokens: list[int], features: Tensor, slot: int) -> None:
        """Feed tokens to one row, in chunks."""
        cache = self._cache
        for start in range(cache.num_cached[slot], len(tokens) - 1, PREFILL_CHUNK):
            chunk = upload([tokens[start + 1 : start + 1 + PREFILL_CHUNK]], self._head.device)
            known = self._head.encode(features[slot, start : start + chunk.shape[1]].unsqueeze(0))
            self._head.forward(known, chunk, cache, slot)
            cache.num_cached[slot] += chunk.shape[1]


def _features_at(features: Tensor, starts: Tensor, width: int) -> Tensor:
    """Gather features [slots, capacity, hidden] from starts[r] on, int64 [rows] -> [rows, width, hidden]."""
    rows = torch.arange(len(starts), device=starts.device)
    places = starts[:, None] + torch.arange(width, device=starts.device)
    return features[rows[:, None], places.clamp(max=features.shape[1] - 1)]  # padding may exceed the capacity


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    """The last real state of each row: [rows, n, width] and int64 [rows] -> [rows, 1, width]."""
    rows = torch.arange(len(states), device=states.device)
    return states[rows, (lengths - 1).clamp(min=0)].unsqueeze(1)
