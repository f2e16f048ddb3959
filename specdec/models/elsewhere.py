"""A language model on a different device from the one that verifies its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.models.base import MAX_ROLLBACK, Cache, FeatureLayers, LanguageModel
from specdec.trees.columns import Branches


class Elsewhere(LanguageModel):
    """Presents a language model as if it were on the device `home`: moves tokens to it and logits back.

    This is the only place where data crosses devices. It cannot be captured as a CUDA graph.
    """

    def __init__(self, model: LanguageModel, home: torch.device) -> None:
        self.model, self.device = model, home
        self.vocab_size, self.context_length = model.vocab_size, model.context_length
        self.is_encoder_decoder = model.is_encoder_decoder

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> Cache:
        return self.model.allocate(num_slots, capacity, features=features, max_rollback=max_rollback)

    def read(self, prompt: Sequence[int], cache: Any, slot: int) -> None:
        self.model.read(prompt, cache, slot)  # type: ignore[attr-defined]  # where the model is an EncoderDecoder

    def forward(
        self,
        tokens: Tensor,
        cache: Any,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        options = {} if branches is None else {"branches": branches}
        logits = self.model.forward(tokens.to(self.model.device), cache, first_slot, last_only, **options)
        return logits.to(self.device)


def seen_from(model: LanguageModel, home: torch.device) -> LanguageModel:
    """The model, wrapped in `Elsewhere` if it is not on the device `home`."""
    return model if model.device == home else Elsewhere(model, home)
