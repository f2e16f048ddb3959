"""Weights rounded to 8 or 4 bits: per row, in groups, or as GGUF files have them.

| name | codes | scales | bits per weight |
|---|---|---|---|
| int8 | -127 to 127 | one for each row (output) | 8.5 |
| int4 | 0 to 15 | a scale and a minimum for each group of 32 inputs, with the least squared error | 5 |
| q8_0, q4_1, q4_0 | as GGUF has them | of each group of 32 inputs, from its extremes | 8.5, 5, 4.5 |

The kernels read scales of groups, so those of int8 are repeated for each group; its codes alone are 8 bits.
Source of the search for int4: the quantizer of k-quants in llama.cpp tries several ranges for each group and solves for
scale and minimum, https://github.com/ggml-org/llama.cpp/pull/1684.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.kernels.quantized import GROUP, Quantized
from specdec.models.gguf.codes import as_quantized

_PIECE = 1 << 18  # weights at a time, so that their float32 copies stay in the cache
_RANGES = (15.0, 14.0, 16.0, 17.0, 18.0, 19.0)  # steps of the first scale from a group's minimum to its maximum


def quantize(weight: Tensor, name: str) -> Quantized:
    """Quantize weights float [out, in]; `in` must be a multiple of 32. name: of QUANTIZERS."""
    return QUANTIZERS[name](weight.detach())


def _int8(weight: Tensor) -> Quantized:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).half()
    divisor = torch.where(scale == 0, 1.0, scale.float())
    codes = (weight.float() / divisor).round().clamp(-127, 127)
    scales = scale.expand(-1, weight.shape[1] // GROUP).contiguous()
    return Quantized("Q8_0", (codes + 128).to(torch.uint8), (scales,))


def _int4(weight: Tensor) -> Quantized:
    pieces = [_fitted(piece) for piece in weight.split(max(1, _PIECE // weight.shape[1]))]
    codes, scales, minima = (torch.cat(each) for each in zip(*pieces, strict=True))
    return Quantized("Q4_1", codes, (scales, minima))


def _fitted(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], and scales and minima [out, in / 32]: for each group the best of several ranges."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, span = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    best = _Fit.of(groups, (span / _RANGES[0]).half(), low.half())
    for steps in _RANGES:
        first = _Fit.of(groups, span / steps, low)
        best = best.or_better(_Fit.of(groups, *(each.half() for each in first.solved(groups))))
    return best.codes.to(torch.uint8).flatten(1), best.scale.squeeze(-1), best.minimum.squeeze(-1)


@dataclass(frozen=True, slots=True, eq=False)
class _Fit:
    """Groups of weights as scale * code + minimum, and the squared error of each group, [..., 1]."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    error: Tensor

    @classmethod
    def of(cls, groups: Tensor, scale: Tensor, minimum: Tensor) -> _Fit:
        """The nearest codes for these scales and minima, [..., 1]."""
        divisor = torch.where(scale == 0, 1.0, scale.float())
        codes = ((groups - minimum) / divisor).round_().clamp_(0, 15)
        error = (codes * scale + minimum - groups).square_().sum(-1, keepdim=True)
        return cls(codes, scale, minimum, error)

    def solved(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the minimum with the least squared error for these codes."""
        mean_code, mean = self.codes.mean(-1, keepdim=True), groups.mean(-1, keepdim=True)
        centered = self.codes - mean_code
        variance = centered.square().sum(-1, keepdim=True)
        covariance = (centered * groups).sum(-1, keepdim=True)
        scale = torch.where(variance == 0, 0.0, covariance / variance.clamp(min=1e-30))
        return scale, mean - scale * mean_code

    def or_better(self, other: _Fit) -> _Fit:
        """The other fit for the groups where its error is smaller."""
        better = other.error < self.error
        return _Fit(
            torch.where(better, other.codes, self.codes),
            torch.where(better, other.scale, self.scale),
            torch.where(better, other.minimum, self.minimum),
            torch.where(better, other.error, self.error),
        )


def _gguf(kind: str) -> Callable[[Tensor], Quantized]:
    """As the package gguf quantizes."""

    def quantizer(weight: Tensor) -> Quantized:
        import gguf

        blocks = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[kind])
        return as_quantized(torch.from_numpy(blocks), kind, len(weight))

    return quantizer


QUANTIZERS: dict[str, Callable[[Tensor], Quantized]] = {
    "int8": _int8,
    "int4": _int4,
    "q8_0": _gguf("Q8_0"),
    "q4_1": _gguf("Q4_1"),
    "q4_0": _gguf("Q4_0"),
}
OF_HEAD = {"int4": "int8", "q4_1": "q8_0", "q4_0": "q8_0"}  # 4 bits in an output head cost more than they save
