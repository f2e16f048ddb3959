"""Dequantize GGUF blocks into weights of any dtype, bit-identical to the package gguf followed by one rounding."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 18  # weights at a time: their float32 copy stays in a core's cache
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def dequantize(stored: NDArray[np.uint8], kind: str, dtype: torch.dtype) -> Tensor:
    """Dequantize stored weights into a flat tensor. stored: [n], whole blocks. kind: such as "Q4_K" or "F16".

    The package gguf does the arithmetic, in float32, and of as many blocks as stay in the cache: of a whole tensor it
    would write several copies to memory. Raises NotImplementedError for a kind that it cannot dequantize.
    """
    if kind in _PLAIN:
        return torch.from_numpy(stored).view(_PLAIN[kind]).to(dtype, copy=True)
    import gguf

    type_ = gguf.GGMLQuantizationType[kind]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    weights = torch.empty(len(stored) // block_bytes * block_size, dtype=dtype)
    step = PIECE // block_size
    for block in range(0, len(stored) // block_bytes, step):
        # one long row: the package works through groups of 16 rows
        row = stored[block * block_bytes : (block + step) * block_bytes][None]
        values = torch.from_numpy(gguf.quants.dequantize(row, type_)).flatten()
        weights[block * block_size : block * block_size + len(values)] = values
    return weights
