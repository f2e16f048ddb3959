"""Drafts from a sequential head, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.base import SequentialHead
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import Pending, draw_chain
from specdec.proposers.heads.base import HeadProposer, features_at
from specdec.proposers.ngram import pad
from specdec.proposers.tree import Level, LogitsAt, draw_tree
from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.trees.shape import Tree
from specdec.verification import Draft


class EagleProposer(HeadProposer):
    """A SequentialHead with a cache of its own: EAGLE, EAGLE-3 and MTP.

    The cache holds what was computed from the target's features; what was computed from the head's own states while
    drafting is overwritten at the next step, accepted or not. tree: the shape of its drafts; None draws chains.
    """

    _head: SequentialHead

    def __init__(
        self,
        head: SequentialHead,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
        tree: Tree | None = None,
    ) -> None:
        super().__init__(head, uniforms, adaptive)
        self.tree = tree
        self.max_pending = tree.depth + 1 if tree else None

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._head.vocab_size, self._head.device)
        self._reserve(batch)
        if batch.recording and not self._adaptive:
            pending = self._pending(batch, self.max_pending or batch.max_draft + 1)
            return self._record(batch, limits, pending, self._cache, self._cache.num_cached[: len(batch.rows)])
        if self.tree:
            return self._branching(batch, limits, self.tree)
        return self._drawn(batch, limits)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache, features), head, states = inputs, self._head, torch.empty(0)

        def logits(drafted: Tensor) -> Tensor:
            nonlocal states
            if drafted.shape[1]:
                states = head.forward_at(states, drafted[:, -1:], pending.ends + drafted.shape[1] - 1, cache, extent)
            else:
                states = self._state_after(pending, features.value, cache, extent)
            return head.logits(states)

        return logits

    def logits_at(self, pending: Pending, extent: int, *inputs: Any) -> LogitsAt:
        (cache, features), head, states = inputs, self._head, torch.empty(0)

        def logits(level: Level, parents: Tensor) -> Tensor:
            nonlocal states
            if level.number:
                above = states[:, level.above]
                states = head.forward_at(above, parents, pending.ends, cache, extent, level.branches)
            else:
                states = self._state_after(pending, features.value, cache, extent)
            return head.logits(states)

        return logits

    def _state_after(self, pending: Pending, features: Tensor, cache: Any, extent: int) -> Tensor:
        """Feed the pending tokens; returns the state after the last, [rows, 1, width]."""
        known = self._head.encode(features_at(features, pending.starts, pending.tokens.shape[1]))
        return _last(self._head.forward_at(known, pending.tokens, pending.starts, cache, extent), pending.num)

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

    def _catch_up(self, batch: Batch, longest: int) -> Tensor:
        """Feed each row the committed tokens it lacks; returns the state after the last, [rows, 1, width].

        longest: maximum tokens per row in the joint call; a row that lacks more is first fed alone.
        """
        assert batch.features is not None
        cache, pending = self._cache, self._pending(batch, longest)
        tokens, lengths = pad(pending, self._head.device)
        starts = upload(cache.num_cached[: len(pending)], tokens.device)
        known = self._head.encode(features_at(batch.features, starts, tokens.shape[1]))
        states = self._head.forward(known, tokens, cache)
        for slot, fed in enumerate(pending):
            cache.num_cached[slot] += len(fed)
        return _last(states, lengths)

    def _feed(self, features: Tensor, tokens: Tensor, slot: int) -> None:
        self._head.forward(self._head.encode(features), tokens, self._cache, slot)


def _last(states: Tensor, lengths: Tensor) -> Tensor:
    """The last real state of each row: [rows, n, width] and int64 [rows] -> [rows, 1, width]."""
    return state_at(states, lengths - 1)


def state_at(states: Tensor, places: Tensor) -> Tensor:
    """Each row's state at its place: [rows, n, width] and int64 [rows] -> [rows, 1, width]."""
    rows = torch.arange(len(states), device=states.device)
    return states[rows, places.clamp(min=0)].unsqueeze(1)
