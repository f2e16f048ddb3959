"""The cache of a head in training, so that the same forward pass serves decoding and training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class _Window:
    """What a head reads of the open window. positions: int64 [1 or texts, width]."""

    positions: Tensor


class TrainingCache:
    """What a head needs of a RaggedCache, with gradients: keys and values are appended, and attention is given.

    A text is a row. In training, tokens of several draft positions, or of drafts after several places, are in one row,
    so that no order of columns implies what a token may attend to. num_layers: of the head, all with full attention.
    """

    def __init__(self, num_layers: int) -> None:
        self.local = (None,) * num_layers
        self._parts: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def open(self, positions: Tensor, visible: Tensor) -> None:
        """Prepare to append tokens.

        positions: int64 [1 or texts, width]. visible: bool [1 or texts, width, columns], which columns each token
        attends to, of those in the cache and then of the appended ones.
        """
        self.window, self._visible = _Window(positions), visible

    def mask(self, dtype: torch.dtype, local: None = None) -> Tensor:
        """Attention mask of the open window, bool [1 or texts, 1, width, columns]."""
        return self._visible.unsqueeze(1)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [texts, heads, width, head_dim] of a layer; returns all of them."""
        parts = self._parts.setdefault(layer, ([], []))
        for part, states in zip(parts, (keys, values), strict=True):
            part.append(states)
        return torch.cat(parts[0], 2), torch.cat(parts[1], 2)
