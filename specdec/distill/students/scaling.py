"""Weights parametrized so that an optimizer sees inputs and outputs of unit size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from specdec.heads.eagle import EagleHead
from specdec.heads.p_eagle import PEagleHead
from specdec.heads.sequential import HeadModule


class Scale(nn.Module):
    """A weight matrix [out, in], parametrized as a trained matrix times fixed scales of its rows and columns.

    An optimizer updates all entries by similar amounts, so inputs and outputs are scaled to unit size.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor | float, columns: Tensor | float) -> None:
        super().__init__()
        self.register_buffer("rows", torch.as_tensor(rows).view(-1, 1), persistent=False)
        self.register_buffer("columns", torch.as_tensor(columns), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        scaled: Tensor = weight * self.rows * self.columns
        return scaled


def scale(module: Any, rows: Tensor | float, columns: Tensor | float, name: str = "weight") -> None:
    """Parametrize a module's weight of this name by `Scale`, until `unscale`."""
    register_parametrization(module, name, Scale(rows, columns))


def unscale(module: nn.Module) -> None:
    """Fold all scales into ordinary weights."""
    for part in module.modules():
        if is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                remove_parametrizations(part, name)


def root_mean_square(x: Tensor) -> Tensor:
    """Of all entries."""
    return x.float().square().mean().sqrt()


def scale_head(head: HeadModule, sizes: Tensor) -> None:
    """Parametrize what reads the target's features, float [features] of these root mean squares, by `Scale`."""
    if isinstance(head, EagleHead):
        _scale_eagle(head, sizes)
    elif (fc := getattr(head, "fc", None)) is not None:
        scale(fc, 1.0, 1 / sizes)
    if isinstance(head, PEagleHead):
        scale(head, 1.0, sizes, "mask_hidden")


def _scale_eagle(head: EagleHead, sizes: Tensor) -> None:
    """An EAGLE head predicts features, so that its layer writes numbers of their sizes, too."""
    layer: Any = head.layers[0]
    embedding_size = root_mean_square(head.embedding).expand_as(sizes)
    scale(head.fc, sizes, 1 / torch.cat([embedding_size, sizes]))
    for reads in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        scale(reads, 1.0, 1 / sizes)
    for writes in (layer.self_attn.o_proj, layer.mlp.down_proj):
        scale(writes, sizes, 1.0)
    layer.post_attention_layernorm.weight.data = root_mean_square(sizes) / sizes
