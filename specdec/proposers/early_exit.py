"""Self-drafting: the target's first layers, with its own norm and head, draw the draft (LayerSkip's early exit).

No weights and no cache of its own: keys and values of these layers go where the target keeps them. The target's step
computes these layers again for all tokens of the draft, and so is exact whatever stands there. To go on from the stored
states instead would save nothing: the last drafted token has not been through these layers, and what they cost for one
token, reading their weights, is what they cost for a few.

Source: Elhoushi et al. 2024, LayerSkip (arXiv:2404.16710), whose models are trained to be left early; others seldom
guess well from their first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from specdec.device_rows import RowState
from specdec.models.base import Cache, FixedShapeModel, LanguageModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import Proposer
from specdec.proposers.chain import draw_chain, draw_fixed
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Distribution
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.sampling.state import RowParams
from specdec.verification import Draft


class EarlyExitProposer(Proposer):
    """Drafts with a model that shares the target's cache, which holds all tokens of a row but the last.

    model: the target's first layers, see `specdec.models.early_exit`.
    """

    def __init__(
        self, model: LanguageModel, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        self._model, self._uniforms, self._adaptive = model, uniforms, adaptive

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._model.vocab_size, self._model.device)
        if batch.recording and not self._adaptive:
            return self._recorded(batch, limits)
        return self._drawn(batch, limits)

    @property
    def is_fixed(self) -> bool:
        return self._adaptive is None

    @property
    def context_length(self) -> int:
        return self._model.context_length

    def enter(self, batch: Batch, slot: int) -> list[int]:
        row = batch.rows[slot]
        assert row
        return row.tokens[-1:]

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (batch.cache,)

    def draft_from(
        self, state: RowState, rows: RowParams, num_tokens: int, extent: int, *inputs: Any
    ) -> tuple[Tensor, Distribution, Tensor]:
        (cache,) = inputs
        return self._loop(state.newest.squeeze(1), state.num_tokens, rows, num_tokens, extent, cache)

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        return torch.ones_like(accepted)

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        """Nothing is kept of a row."""

    def _drawn(self, batch: Batch, limits: Sequence[int]) -> Draft:
        cache: Any = batch.cache
        last = upload(batch.last_tokens(), self._model.device).unsqueeze(1)

        def logits_after(drafted: Tensor) -> Tensor:
            number = drafted.shape[1]
            cache.num_cached[: len(batch.rows)] = [length - 1 + number for length in batch.num_tokens()]
            return self._model.forward(drafted[:, -1:] if number else last, cache)

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive)

    def _recorded(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """The whole draft as one recording."""
        assert batch.recording
        cache: Any = batch.cache
        device, lengths = self._model.device, batch.num_tokens()
        extent = cache.extent_for(max(lengths) + batch.max_draft)
        drafted, distribution, finite = batch.recording(
            self._loop,
            upload(batch.last_tokens(), device),
            upload(lengths, device),
            batch.sampling.rows,
            batch.max_draft,
            extent,
            cache,
        )
        return Draft(drafted, upload(limits, device), distribution, finite=finite)

    def _loop(
        self, last: Tensor, origins: Tensor, rows: RowParams, num_tokens: int, extent: int, cache: Cache
    ) -> tuple[Tensor, Distribution, Tensor]:
        """A draft after tokens int64 [rows] that stand before the origins; see `draw_fixed`."""
        model = cast("FixedShapeModel", self._model)

        def logits_after(drafted: Tensor) -> Tensor:
            tokens = torch.cat([last.unsqueeze(1), drafted], 1)[:, -1:]
            return model.forward_at(tokens, origins - 1 + drafted.shape[1], cache, extent)

        return draw_fixed(rows, origins, num_tokens, logits_after, self._uniforms)
