"""Drafts from a smaller language model, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from specdec.adaptive import AdaptiveLength
from specdec.devices import fetch_later, upload
from specdec.models import Cache, FixedShapeModel, LanguageModel, prefill
from specdec.proposers.chain import draw_chain, draw_fixed
from specdec.proposers.ngram import pad
from specdec.randomness import UniformSource, uniforms
from specdec.requests import Batch, Generation
from specdec.sampling import Law, RowParams
from specdec.verification import Draft


@dataclass(slots=True)
class _Slot:
    """What a cache slot was fed: num_committed of the owner's tokens, then `drafted` tokens that may be rejected."""

    owner: Generation | None = None
    num_committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def num_valid(self, row: Generation) -> int:
        """How many leading tokens of the row the cache already holds; at least one token is left to feed."""
        if self.owner is not row:
            return 0
        valid = self.num_committed
        for token in self.drafted:
            if valid >= len(row.tokens) or row.tokens[valid] != token:
                break
            valid += 1
        return min(valid, len(row.tokens) - 1)


class DraftModelProposer:
    """A draft model with its own ragged cache.

    The cache is kept in step by comparison: what a slot holds is valid as far as it agrees with the committed tokens.
    This covers rejection (the rejected tail is overwritten), full acceptance (the last draft token was never fed, and
    is fed now with the bonus token) and a slot that changed hands (nothing is valid).
    """

    def __init__(
        self, model: LanguageModel, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        self._model, self._uniforms, self._adaptive = model, uniforms, adaptive
        self._cache: Any = None
        self._slots: list[_Slot] = []
        self._fed: Tensor | None = None  # drafted tokens that the last call fed, [rows, n]

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        limits = [
            max(0, min(limit, self._model.context_length - length))
            for limit, length in zip(limits, batch.lengths(), strict=True)
        ]
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), self._model.vocab_size, self._model.device)
        self._reserve(batch)
        self._settle()
        draft = self._recorded(batch, limits) if batch.recording and not self._adaptive else self._drawn(batch, limits)
        if draft.tokens.shape[1] == 0:
            return draft  # nothing was fed
        self._fed = fetch_later(draft.tokens[:, :-1])
        for slot, row in zip(self._slots, batch.rows, strict=False):
            slot.owner, slot.num_committed, slot.drafted = row, len(row.tokens) if row else 0, []
        return draft

    def _reserve(self, batch: Batch) -> None:
        if self._cache is None or self._cache.capacity < batch.capacity or len(self._slots) < batch.num_slots:
            self._cache = self._model.allocate(batch.num_slots, batch.capacity)
            self._slots, self._fed = [_Slot() for _ in range(batch.num_slots)], None

    def _settle(self) -> None:
        """Enter what the last call fed, which has become known on the host since."""
        if self._fed is not None:
            for slot, fed in zip(self._slots, self._fed.tolist(), strict=False):
                slot.drafted = fed
            self._fed = None

    def _drawn(self, batch: Batch, limits: Sequence[int]) -> Draft:
        def logits_after(drafted: Tensor) -> Tensor:
            return self._feed(drafted[:, -1:]) if drafted.shape[1] else self._catch_up(batch)

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive)

    def _recorded(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """The whole draft as one recording: a row lacks one token, or two where all were accepted."""
        assert batch.recording
        device, most = self._model.device, 2
        tokens, lengths = pad(self._pending(batch, most), device, most)
        starts = self._cache.lengths[: len(batch.rows)]
        extent = self._cache.extent_for(max(starts) + most + batch.max_draft)
        places = (upload(starts, device), lengths, upload(batch.lengths(), device))
        drafted, law, finite = batch.recording(
            self._loop, tokens, *places, batch.sampling.rows, batch.max_draft, extent, self._cache
        )
        batch.sampling.note(finite)
        return Draft(drafted, upload(limits, device), law)

    def _loop(
        self,
        tokens: Tensor,
        starts: Tensor,
        lengths: Tensor,
        origins: Tensor,
        rows: RowParams,
        num_tokens: int,
        extent: int,
        cache: Cache,
    ) -> tuple[Tensor, Law, Tensor]:
        """A draft after pending tokens [rows, 2], of which lengths[r] are real; see `draw_fixed`."""
        model = cast("FixedShapeModel", self._model)

        def logits_after(drafted: Tensor) -> Tensor:
            if drafted.shape[1] == 0:
                return _at(model.forward_at(tokens, starts, cache, extent), lengths - 1)
            return model.forward_at(drafted[:, -1:], starts + lengths + drafted.shape[1] - 1, cache, extent)

        return draw_fixed(rows, origins, num_tokens, logits_after, self._uniforms)

    def _pending(self, batch: Batch, most: int | None = None) -> list[list[int]]:
        """The committed tokens that each slot lacks, at least one; what is beyond `most` of them is fed now."""
        pending = []
        for index, (slot, row) in enumerate(zip(self._slots, batch.rows, strict=False)):
            valid = slot.num_valid(row) if row else 0
            self._cache.lengths[index] = valid
            missing = row.tokens[valid:] if row else [0]
            if row and len(missing) > 1 and (valid == 0 or len(missing) > (most or len(missing))):
                prefill(self._model, missing[:-1], self._cache, index, batch.recorder)
                missing = missing[-1:]
            pending.append(missing)
        return pending

    def _catch_up(self, batch: Batch) -> Tensor:
        """Feed each row the committed tokens its slot lacks; returns the logits after the last, [rows, 1, vocab]."""
        pending = self._pending(batch)
        tokens, lengths = pad(pending, self._model.device)
        logits = self._model.forward(tokens, self._cache)
        for index, fed in enumerate(pending):
            self._cache.lengths[index] += len(fed)
        return _at(logits, lengths - 1)

    def _feed(self, tokens: Tensor) -> Tensor:
        logits = self._model.forward(tokens, self._cache)
        for index in range(len(tokens)):
            self._cache.lengths[index] += 1
        return logits


def _at(logits: Tensor, places: Tensor) -> Tensor:
    """Each row's logits at its place: [rows, width, vocab] and int64 [rows] -> [rows, 1, vocab]."""
    return logits.gather(1, places.view(-1, 1, 1).expand(-1, 1, logits.shape[-1]))
