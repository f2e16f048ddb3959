"""Rotary embeddings of fused layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

Angles = tuple[Tensor, Tensor]  # cos and sin


class Rotary:
    """A transformers rotary embedding, whose angles may depend on the kind of the layer, as in Gemma 3.

    layers: of a model, in order.
    """

    def __init__(self, module: Any, layers: Iterable[Any]) -> None:
        self._module = module
        differs = isinstance(getattr(module, "rope_type", None), dict)
        self._kinds: list[str | None] = [layer.layer_type if differs else None for layer in layers]
        self.depends_on_length = depends_on_length(module)

    def angles(self, hidden: Tensor, positions: Tensor) -> list[Angles]:
        """cos and sin of each layer, [rows, width, head_dim] in the dtype of the hidden states.

        positions: int64 [rows, width]. Layers of the same kind share their tensors.
        """
        by_kind = {kind: self._angles_of(kind, hidden, positions) for kind in dict.fromkeys(self._kinds)}
        return [by_kind[kind] for kind in self._kinds]

    def _angles_of(self, kind: str | None, hidden: Tensor, positions: Tensor) -> Angles:
        cos, sin = self._module(hidden, positions, *([] if kind is None else [kind]))
        return cos, sin


def depends_on_length(rotary: Any) -> bool:
    """Whether a transformers rotary embedding selects its angles by the largest position of a call.

    It then reads that position back from the device, so calls cannot be captured as CUDA graphs.
    """
    kinds = getattr(rotary, "rope_type", "default")
    by_layer = kinds.values() if isinstance(kinds, dict) else [kinds]
    return any("dynamic" in kind or kind == "longrope" for kind in by_layer)
