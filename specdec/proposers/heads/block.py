"""Drafts from a head that drafts a block in one pass, drawn slot by slot with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.base import BlockHead
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import Pending, draw_chain
from specdec.proposers.heads.base import HeadProposer, features_at
from specdec.proposers.ngram import pad
from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.verification import Draft


class BlockProposer(HeadProposer):
    """A BlockHead with a cache of its own: DFlash, DFlash2, DSpark and Domino.

    A block is as wide as drafts may be, however long those of a step are: what a token attends to, and so a row's
    distributions, must not depend on the other rows.
    """

    _head: BlockHead

    def __init__(
        self, head: BlockHead, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        super().__init__(head, uniforms, adaptive)
        self._width = 0

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        limits = [min(limit, self._head.max_tokens) for limit in limits]
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._head.vocab_size, self._head.device)
        self._reserve(batch)
        pending = self._pending(batch, batch.max_draft + 1)
        if batch.recording and not self._adaptive and self._width == batch.max_draft:
            return self._record(batch, limits, pending, self._cache, self._cache.num_cached[: len(batch.rows)])
        return self._drawn(batch, limits, pending)

    @property
    def is_fixed(self) -> bool:
        return self._adaptive is None

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache, features), head = inputs, self._head
        known = features_at(features.value, pending.starts, pending.tokens.shape[1])
        head.extend_at(known, pending.tokens, pending.starts, cache, extent)
        newest = _newest(pending.tokens, pending.num)
        block = head.block_at(newest, self._width, pending.ends, cache, extent)
        return lambda drafted: head.logits(block, newest, drafted)

    def _reserve(self, batch: Batch, extra: int = 0) -> None:
        self._width = min(batch.max_draft, self._head.max_tokens)
        super()._reserve(batch, 2 * (batch.max_draft + 1))  # a block, and padding of rows that lack fewer tokens

    def _drawn(self, batch: Batch, limits: Sequence[int], pending: Sequence[Sequence[int]]) -> Draft:
        assert batch.features is not None
        head, cache = self._head, self._cache
        tokens, lengths = pad(pending, head.device)
        starts = upload(cache.num_cached[: len(pending)], tokens.device)
        head.extend(features_at(batch.features, starts, tokens.shape[1]), tokens, cache)
        for slot, fed in enumerate(pending):
            cache.num_cached[slot] += len(fed)
        newest = _newest(tokens, lengths)
        block = head.block(newest, self._width, cache)
        return draw_chain(
            batch,
            limits,
            lambda drafted: head.logits(block, newest, drafted),
            self._uniforms,
            self._adaptive,
            self._vocabulary,
            lambda drafted: head.confidence(block, newest, drafted),
        )

    def _feed(self, features: Tensor, tokens: Tensor, slot: int) -> None:
        self._head.extend(features, tokens, self._cache, slot)


def _newest(tokens: Tensor, lengths: Tensor) -> Tensor:
    """The last of the first lengths[r] tokens of each row, int64 [rows]."""
    return tokens.gather(1, (lengths - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
