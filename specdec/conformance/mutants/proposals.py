"""Bugs of proposers: drafts that declare another distribution than they were drawn from, or none at all."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.requests import Batch
from specdec.sampling.distributions import Dense, Distribution
from specdec.sampling.randomness import UniformSource
from specdec.sampling.state import SamplingState
from specdec.verification import (
    Draft,
)


class GreedyDraftDeclaredSampled(Proposer):
    """M1: proposes the most probable token but declares the full distribution."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.feature_layers = proposer.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self._proposer.propose(batch, limits)
        return replace(draft, tokens=draft.distribution.dense().argmax(-1)) if draft.tokens.shape[1] else draft


class SampledDraftDeclaredOneHot(GreedyDraftDeclaredSampled):
    """Not a bug, though it resembles M1: the output is lossless conditional on the draft token."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self._proposer.propose(batch, limits)
        return Draft.deterministic(draft.tokens, draft.num_proposed, batch.sampling.vocab_size)


class NeverProposes(GreedyDraftDeclaredSampled):
    """M13: speculation is silently off. The output is lossless; only the counts reveal it."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        return Draft.empty(len(batch.rows), batch.sampling.vocab_size, batch.sampling.device)


class StaleDraftCache(DraftModelProposer):
    """M9: after full acceptance the draft model never sees its own last token. Lossless, but the draft is worse."""

    def _catch_up(self, batch: Batch, texts: Sequence[list[int]], most: int) -> Tensor:
        for slot, row, tokens in zip(self._slots, batch.rows, texts, strict=False):
            if row and slot.owner is row and slot.num_valid(row, tokens) == len(tokens) - 2:
                slot.drafted = [*slot.drafted, tokens[-2]]
        return super()._catch_up(batch, texts, most)


class _DrawnBySums(Dense):
    """Draws a token by cumulative sums in bfloat16, whose few bits drop unlikely tokens of high ids."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Dense:
        return _DrawnBySums(self.probs[index])

    def draw(self, uniforms: Tensor) -> Tensor:
        return Dense(drawn_by_bfloat16_sums(self.probs)).draw(uniforms)


def drawn_by_bfloat16_sums(probs: Tensor) -> Tensor:
    """The distribution that is drawn from if the cumulative sums of float [..., vocab] are rounded to bfloat16."""
    sums = probs.double().cumsum(-1).bfloat16().to(probs.dtype)
    sums[..., -1] = 1.0
    return sums.diff(dim=-1, prepend=torch.zeros_like(sums[..., :1]))


class _LowPrecision(SamplingState):
    """Sampling parameters whose draft distributions are drawn from by `_DrawnBySums`."""

    def distribution(self, *args: Any, **options: Any) -> tuple[Distribution, Tensor]:
        distribution, finite = super().distribution(*args, **options)
        return _DrawnBySums(distribution.dense()), finite


class DrawnInLowPrecision(GreedyDraftDeclaredSampled):
    """M15: draws the draft by cumulative sums in bfloat16 but declares the distribution in float32."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        sampling = copy(batch.sampling)
        sampling.__class__ = _LowPrecision
        return self._proposer.propose(replace(batch, sampling=sampling), limits)


class PeekingLength(GreedyDraftDeclaredSampled):
    """M20: ends a draft before a token that the draft finds unlikely, once it has been drawn.

    The token's own draw then decides whether it is verified, so that unlikely tokens are drawn from the target twice.
    """

    threshold = 0.3

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self._proposer.propose(batch, limits)
        likely = draft.distribution.prob(draft.tokens) >= self.threshold
        return replace(draft, num_proposed=torch.minimum(draft.num_proposed, likely.long().cumprod(1).sum(1)))


def prompt_lookup(draft: Any, source: UniformSource) -> Proposer:
    """A proposer of `maker` whose drafts have different lengths in the rows of a batch; uses no draft model."""
    return NgramProposer(draft.vocab_size, draft.device, LookupIndex)
