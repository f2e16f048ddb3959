"""The attention call of a decode step with each of torch's back ends."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # queries, keys, values, mask
BACK_ENDS: dict[str, Any] = {
    "torch's choice": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of a decode step: `width` tokens attend to `extent` columns; heads of a group are packed as rows."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    extent: int
    width: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values in a dtype of two bytes."""
        return 2 * 2 * self.num_kv_heads * self.extent * self.head_dim

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Inputs:
        """Random queries [1, KV heads, group * width, head_dim], keys and values, and an additive mask."""
        groups = self.num_heads // self.num_kv_heads
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        queries = torch.randn(1, self.num_kv_heads, groups * self.width, self.head_dim, **options)
        keys, values = torch.randn(2, 1, self.num_kv_heads, self.extent, self.head_dim, **options)
        mask = torch.zeros(1, 1, groups * self.width, self.extent, **options)
        mask[..., -self.extent // 8 :] = torch.finfo(dtype).min
        return queries, keys, values, mask


def attended(inputs: Inputs, back_end: Any = None) -> Tensor:
    """The output of one back end, or of torch's default. Raises RuntimeError if the back end does not support it."""
    queries, keys, values, mask = inputs
    with sdpa_kernel([back_end]) if back_end else contextlib.nullcontext():
        return scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
