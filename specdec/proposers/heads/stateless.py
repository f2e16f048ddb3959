"""Drafts from heads without a cache, which read the target's last hidden state and the tokens after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.base import StatelessHead
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import ChainProposer, Pending, draw_chain
from specdec.proposers.heads.base import features_at
from specdec.proposers.tree import Level, LogitsAt, draw_tree
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.trees.shape import Tree
from specdec.verification import Draft


class StatelessProposer(ChainProposer):
    """A StatelessHead as a proposer. Nothing is kept between steps, so nothing can fall out of step.

    tree: the shape of the drafts; None draws chains. Drafts are cut to the head's max_tokens.
    """

    context_length = 1 << 30  # no limit of its own
    max_pending = 1

    def __init__(
        self,
        head: StatelessHead,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
        tree: Tree | None = None,
    ) -> None:
        self._head, self._uniforms, self._adaptive, self.tree = head, uniforms, adaptive, tree
        self._vocabulary, self.feature_layers = head.draft_vocabulary, head.feature_layers
        self._max_tokens = head.max_tokens or sys.maxsize

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        limits = [min(limit, self._max_tokens) for limit in limits]
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._head.vocab_size, self._head.device)
        assert batch.features is not None
        device = batch.sampling.device
        newest = upload(batch.last_tokens(), device).unsqueeze(1)
        places = upload([max(0, length - 2) for length in batch.num_tokens()], device)
        features = features_at(batch.features, places, 1)
        if self.tree:
            logits_at = self._logits_at(features, newest)
            return draw_tree(batch, limits, self.tree, logits_at, self._uniforms, self._vocabulary)
        logits_after = self._logits_after(features, newest)
        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive, self._vocabulary)

    def enter(self, batch: Batch, slot: int) -> list[int]:
        row = batch.rows[slot]
        assert row
        return row.tokens[-1:]

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        assert batch.features is not None
        return (InPlace(batch.features),)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        return self._logits_after(_features_before(pending, inputs[0].value), pending.tokens)

    def logits_at(self, pending: Pending, extent: int, *inputs: Any) -> LogitsAt:
        return self._logits_at(_features_before(pending, inputs[0].value), pending.tokens)

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return torch.ones_like(accepted)

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        return

    def _logits_after(self, features: Tensor, newest: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that chains are drawn by, of features [rows, 1, width] and newest tokens int64 [rows, 1]."""
        head, states = self._head, self._head.start(features)

        def logits(drafted: Tensor) -> Tensor:
            nonlocal states
            place = drafted.shape[1]
            states = head.advance(place, states, drafted[:, -1:] if place else newest)
            return head.logits(place, states)

        return logits

    def _logits_at(self, features: Tensor, newest: Tensor) -> LogitsAt:
        """The function that trees are drawn by."""
        head, states = self._head, self._head.start(features)

        def logits(level: Level, parents: Tensor) -> Tensor:
            nonlocal states
            if level.number:
                states = head.advance(level.number, states[:, level.above], parents)
            else:
                states = head.advance(0, states, newest)
            return head.logits(level.number, states)

        return logits


def _features_before(pending: Pending, features: Tensor) -> Tensor:
    """Features [slots, capacity, width] of the token before each row's newest, [rows, 1, width]."""
    return features_at(features, (pending.starts - 1).clamp(min=0), 1)
