"""Drafts from a language model that proposes several tokens in one pass, PARD (An et al. 2025, arXiv:2504.18583).

The model is an ordinary causal one, trained to fill in mask tokens: after the newest token it reads k - 1 of them, and
the logits at each of these k places are of one draft token. Given the text the places are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from specdec.models.base import FixedShapeModel, LanguageModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import Pending, draw_chain, with_masks
from specdec.proposers.draft_model import DraftModelProposer, at
from specdec.proposers.ngram import pad
from specdec.requests import Batch
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.verification import Draft


class PardProposer(DraftModelProposer):
    """A parallel draft model. mask_token: the token id that it fills in.

    The next step overwrites the cache entries of mask tokens, so all emitted tokens of a step are fed again.
    """

    max_pending = None
    feeds_drafts = False

    def __init__(
        self,
        model: LanguageModel,
        mask_token: int,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        super().__init__(model, uniforms, adaptive)
        self._mask_token, self._num_masks = mask_token, 0

    def enter(self, batch: Batch, slot: int) -> list[int]:
        self._num_masks = batch.max_draft - 1
        return super().enter(batch, slot)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache,), model = inputs, cast("FixedShapeModel", self._model)
        tokens = self._masked(pending.tokens, pending.num)
        logits = model.forward_at(tokens, pending.starts, cache, extent)
        return lambda drafted: at(logits, pending.num - 1 + drafted.shape[1])

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return accepted + 1

    def _draft(self, batch: Batch, texts: Sequence[list[int]], limits: Sequence[int]) -> Draft:
        self._num_masks = (batch.max_draft if batch.recording else max(limits)) - 1
        return super()._draft(batch, texts, limits)

    def _drawn(self, batch: Batch, texts: Sequence[list[int]], limits: Sequence[int]) -> Draft:
        pending = self._pending(batch, texts, max(limits) + 1)
        tokens, lengths = pad(pending, self._model.device)
        logits = self._model.forward(self._masked(tokens, lengths), self._cache)
        for slot, fed in enumerate(pending):
            self._cache.num_cached[slot] += len(fed)

        def logits_after(drafted: Tensor) -> Tensor:
            return at(logits, lengths - 1 + drafted.shape[1])

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive)

    def _masked(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The first lengths[r] tokens of row r, int64 [rows, n], then mask tokens: [rows, n + num_masks]."""
        return with_masks(tokens, lengths, self._num_masks, self._mask_token)[0]
