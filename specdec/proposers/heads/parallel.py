"""Drafts from a sequential head that proposes several tokens in one pass, P-EAGLE.

After the tokens that its cache lacks the head reads mask tokens, and the state at the newest token and at each of these
gives the logits of one draft token. Given the text the draft's tokens are independent of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.heads.base import ParallelHead
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import Pending, draw_chain, with_masks
from specdec.proposers.heads.base import features_at
from specdec.proposers.heads.eagle import EagleProposer, state_at
from specdec.proposers.ngram import pad
from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.verification import Draft


class ParallelHeadProposer(EagleProposer):
    """A ParallelHead with a cache of its own. Entries of mask tokens are overwritten at the next step."""

    _head: ParallelHead

    def __init__(
        self, head: ParallelHead, uniforms: UniformSource = uniforms, adaptive: AdaptiveLength | None = None
    ) -> None:
        super().__init__(head, uniforms, adaptive)
        self._num_masks = 0

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        cache, features = inputs
        tokens, states = self._masked(features.value, pending.tokens, pending.num, pending.starts, self._num_masks)
        states = self._head.forward_at(states, tokens, pending.starts, cache, extent)
        return lambda drafted: self._head.logits(state_at(states, pending.num - 1 + drafted.shape[1]))

    def _reserve(self, batch: Batch, extra: int = 0) -> None:
        self._num_masks = batch.max_draft - 1
        super()._reserve(batch, 2 * (batch.max_draft + 1))  # masks, and padding of rows that lack fewer tokens

    def _drawn(self, batch: Batch, limits: Sequence[int]) -> Draft:
        assert batch.features is not None
        head, cache, pending = self._head, self._cache, self._pending(batch, max(limits) + 1)
        tokens, lengths = pad(pending, head.device)
        starts = upload(cache.num_cached[: len(pending)], tokens.device)
        tokens, states = self._masked(batch.features, tokens, lengths, starts, max(limits) - 1)
        states = head.forward(states, tokens, cache)
        for slot, fed in enumerate(pending):
            cache.num_cached[slot] += len(fed)

        def logits_after(drafted: Tensor) -> Tensor:
            return head.logits(state_at(states, lengths - 1 + drafted.shape[1]))

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive, self._vocabulary)

    def _masked(
        self, features: Tensor, tokens: Tensor, lengths: Tensor, starts: Tensor, num_masks: int
    ) -> tuple[Tensor, Tensor]:
        """The first lengths[r] tokens of row r, int64 [rows, n], then mask tokens, and the states of all these.

        Returns int64 [rows, n + num_masks] and float [rows, n + num_masks, width].
        """
        known = self._head.encode(features_at(features, starts, tokens.shape[1]))
        tokens, is_own = with_masks(tokens, lengths, num_masks, self._head.mask_token)
        known = torch.nn.functional.pad(known, (0, 0, 0, num_masks))
        return tokens, torch.where(is_own.unsqueeze(-1), known, self._head.mask_state())
