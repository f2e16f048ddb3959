"""Self-drafting: the target's first layers, with its final norm and head, draw the draft (LayerSkip's early exit).

It needs no weights or cache of its own: it writes keys and values of these layers to the target's cache. The target
step recomputes these layers for all draft tokens, so it is exact whatever was written. Reusing the stored states would
save nothing: the last draft token has not passed through these layers, and reading their weights for one token costs as
much as for several.

Source: Elhoushi et al. 2024, LayerSkip (arXiv:2404.16710). Its models are trained for early exit; the first layers of
other models seldom predict well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from specdec.models.base import FixedShapeModel, LanguageModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import ChainProposer, Pending, draw_chain
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.verification import Draft


class EarlyExitProposer(ChainProposer):
    """Drafts with a model that shares the target's cache, which holds all tokens of a row except the last.

    model: the target's first layers, see `specdec.models.early_exit`.
    """

    max_pending = 1
    _vocabulary = None

    def __init__(
        self, model: LanguageModel, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        self._model, self._uniforms, self._adaptive = model, uniforms, adaptive

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._model.vocab_size, self._model.device)
        if batch.recording and not self._adaptive:
            starts = [num_tokens - 1 for num_tokens in batch.num_tokens()]
            return self._record(batch, limits, [[token] for token in batch.last_tokens()], batch.cache, starts)
        return self._drawn(batch, limits)

    @property
    def context_length(self) -> int:
        return self._model.context_length

    def enter(self, batch: Batch, slot: int) -> list[int]:
        row = batch.rows[slot]
        assert row
        return row.tokens[-1:]

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch.cache,)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache,), model = inputs, cast("FixedShapeModel", self._model)

        def logits(drafted: Tensor) -> Tensor:
            tokens = torch.cat([pending.tokens, drafted], 1)[:, -1:]
            return model.forward_at(tokens, pending.starts + drafted.shape[1], cache, extent)

        return logits

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return torch.ones_like(accepted)

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        """Nothing to record: no state is kept per row."""

    def _drawn(self, batch: Batch, limits: Sequence[int]) -> Draft:
        cache: Any = batch.cache
        last = upload(batch.last_tokens(), self._model.device).unsqueeze(1)

        def logits_after(drafted: Tensor) -> Tensor:
            number = drafted.shape[1]
            cache.num_cached[: len(batch.rows)] = [length - 1 + number for length in batch.num_tokens()]
            return self._model.forward(drafted[:, -1:] if number else last, cache)

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive)
