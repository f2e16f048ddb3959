"""GGUF blocks as codes and scales, without dequantizing them.

Source of the blocks' layouts: gguf.quants in the package gguf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.kernels.quantized import KINDS, Quantized

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


def as_quantized(stored: Tensor, kind: str, num_outputs: int) -> Quantized:
    """Stored weights as codes and scales. stored: uint8 [n], whole blocks in the order of the file. kind: of KINDS."""
    codes, scales, of_supers = _READERS[kind](stored.reshape(-1, BLOCK_BYTES[kind]))

    def rows(values: Tensor) -> Tensor:
        return values.reshape(num_outputs, -1)

    return Quantized(kind, rows(codes), tuple(map(rows, scales)), tuple(map(rows, of_supers)))


Parts = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]  # codes, scales and scales of super-blocks, by block


def _halves(blocks: Tensor, *starts: int) -> tuple[Tensor, ...]:
    """float16 numbers at these bytes of each block: [blocks, 1] each."""
    return tuple(blocks[:, start : start + 2].contiguous().view(torch.float16) for start in starts)


def _nibbles(stored: Tensor) -> Tensor:
    """[..., n] -> [..., 2n]: the low nibbles, then the high ones."""
    return torch.cat([stored & 15, stored >> 4], -1)


def _bits(stored: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[..., n] -> [..., shifts, n]"""
    return torch.stack([stored >> shift & mask for shift in shifts], -2)


def _of_4_bits(num_scales: int) -> Callable[[Tensor], Parts]:
    def read(blocks: Tensor) -> Parts:
        starts = range(0, 2 * num_scales, 2)
        return _nibbles(blocks[:, 2 * num_scales :]), _halves(blocks, *starts), ()

    return read


def _of_5_bits(num_scales: int) -> Callable[[Tensor], Parts]:
    def read(blocks: Tensor) -> Parts:
        starts, fifth = range(0, 2 * num_scales, 2), blocks[:, 2 * num_scales : 2 * num_scales + 4]
        upper = _bits(fifth, tuple(range(8)), 1).transpose(-1, -2).flatten(-2)  # bit i of the dword is input i's
        return _nibbles(blocks[:, 2 * num_scales + 4 :]) | upper << 4, _halves(blocks, *starts), ()

    return read


def _of_8_bits(blocks: Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, _halves(blocks, 0), ()  # code = int8 + 128


def _k_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits, in 12 bytes: uint8 [blocks, 8] each."""
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (
        torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], -1),
        torch.cat([minima & 63, rest >> 4 | minima >> 6 << 4], -1),
    )


def _of_4_bits_k(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, 16:].unflatten(-1, (4, 32))).flatten(1)
    return codes, _k_scales(blocks[:, 4:16]), _halves(blocks, 0, 2)


def _of_5_bits_k(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, 48:].unflatten(-1, (4, 32))).flatten(1)
    upper = _bits(blocks[:, 16:48], tuple(range(8)), 1).flatten(1)
    return codes | upper << 4, _k_scales(blocks[:, 4:16]), _halves(blocks, 0, 2)


def _of_6_bits_k(blocks: Tensor) -> Parts:
    lower = _bits(blocks[:, :128].unflatten(-1, (2, 64)), (0, 4), 15).flatten(1)
    upper = _bits(blocks[:, 128:192].unflatten(-1, (2, 32)), (0, 2, 4, 6), 3).flatten(1)
    scales = blocks[:, 192:208].view(torch.int8).unflatten(-1, (8, 2))
    return lower | upper << 4, (scales[..., 0], scales[..., 1]), _halves(blocks, 208)


_READERS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _of_4_bits(1),
    "Q4_1": _of_4_bits(2),
    "Q5_0": _of_5_bits(1),
    "Q5_1": _of_5_bits(2),
    "Q8_0": _of_8_bits,
    "Q4_K": _of_4_bits_k,
    "Q5_K": _of_5_bits_k,
    "Q6_K": _of_6_bits_k,
}
assert _READERS.keys() == KINDS.keys() == BLOCK_BYTES.keys()
