"""Weights in 4, 6 or 8 bits, in the order that quantized.cpp reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 32  # outputs per block
GROUP = 32  # inputs with one scale
_LANES, _STEPS = 16, 8  # outputs per vector; dwords of a lane per group
_GROUPS = 8  # of a super-block


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of quantized weights. number: in quantized.h. bits: that a code is stored in. zero: the code of 0.

    inputs: their number must be a multiple of this.
    """

    number: int
    bits: int
    zero: int
    inputs: int = GROUP


KINDS = {
    "Q4_0": Kind(0, 4, 8),
    "Q4_1": Kind(1, 4, 0),
    "Q5_0": Kind(2, 6, 16),
    "Q5_1": Kind(3, 6, 0),
    "Q8_0": Kind(4, 8, 128),
    "Q4_K": Kind(5, 4, 0, _GROUPS * GROUP),
    "Q5_K": Kind(6, 6, 0, _GROUPS * GROUP),
    "Q6_K": Kind(7, 6, 32, _GROUPS * GROUP),
}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Weights [out, in] as codes: scale * (code - zero) + minimum, with a scale for each group of inputs.

    kind: one of KINDS. codes: uint8 [out, in]. scales: of each group [out, in / 32], then minima if the kind has them,
    float16. of_supers: for kinds ending in K, those of 8 groups, float16 [out, in / 256]; a group's scale and minimum
    are bytes that multiply them, the minimum negatively. Q6_K has int8 scales of 16 inputs: of the first half of each
    group, then of the second.
    """

    kind: str
    codes: Tensor
    scales: tuple[Tensor, ...]
    of_supers: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class Packed:
    """Quantized weights as quantized.cpp reads them: uint8 [bytes] of [num_outputs, num_inputs]."""

    kind: str
    weights: Tensor
    num_outputs: int
    num_inputs: int


def dequantize(quantized: Quantized) -> Tensor:
    """The weights float32 [out, in], with the bits that the package gguf gives them."""
    codes = quantized.codes.float() - KINDS[quantized.kind].zero
    scales = [each.float() for each in quantized.scales]
    of_supers = [each.float().repeat_interleave(_GROUPS, 1) for each in quantized.of_supers]
    if quantized.kind == "Q6_K":
        halves = torch.stack([each * of_supers[0] for each in scales], -1).flatten(1)
        return codes * halves.repeat_interleave(GROUP // 2, 1)
    if of_supers:
        scales = [scales[0] * of_supers[0], -(scales[1] * of_supers[1])]
    first, *minima = (each.repeat_interleave(GROUP, 1) for each in scales)
    return codes * first + minima[0] if minima else codes * first


def pack(quantized: Quantized) -> Packed:
    """Pack weights; the last block is padded with zeros. The format is documented in quantized.cpp, at `Format`."""
    outputs, inputs = quantized.codes.shape
    kind, missing = KINDS[quantized.kind], -outputs % BLOCK
    codes = pad(quantized.codes, (0, 0, 0, missing)).view(-1, 2, _LANES, inputs // GROUP, _STEPS, 4)
    steps = codes.permute(0, 3, 1, 4, 2, 5).reshape(-1, inputs // GROUP, 2, _STEPS, 4 * _LANES)
    groups = torch.cat([_bits(steps, kind.bits), *(_blocks(each, missing) for each in quantized.scales)], -1)
    if quantized.of_supers:
        supers = torch.cat([_blocks(each, missing) for each in quantized.of_supers], -1)
        groups = torch.cat([supers, groups.reshape(*supers.shape[:2], -1)], -1)
    return Packed(quantized.kind, groups.flatten(), outputs, inputs)


def _bits(steps: Tensor, bits: int) -> Tensor:
    """Codes uint8 [blocks, groups, 2, 8, 64] in 4, 6 or 8 bits: [blocks, groups, bytes]."""
    if bits == 8:
        return steps.flatten(2)
    nibbles = steps & 15
    stored = nibbles[..., :4, :] | nibbles[..., 4:, :] << 4
    if bits == 6:
        upper = (steps >> 4).unflatten(-2, (2, 4))
        pairs = upper[..., 0, :] | upper[..., 1, :] << 2 | upper[..., 2, :] << 4 | upper[..., 3, :] << 6
        stored = torch.cat([stored, pairs], -2)
    return stored.flatten(2)


def _blocks(scales: Tensor, missing: int) -> Tensor:
    """Scales [out, n] by block: uint8 [blocks, n, bytes of 32 outputs]."""
    padded = pad(scales, (0, 0, 0, missing)).view(-1, BLOCK, scales.shape[1])
    return padded.transpose(1, 2).contiguous().view(torch.uint8)
