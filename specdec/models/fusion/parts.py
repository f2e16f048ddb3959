"""Projections and norms of fused layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from specdec.kernels import cpp, gpu
from specdec.kernels.pages import LargePages
from specdec.kernels.quantized import Packed


class QuantizedLinear(nn.Linear):
    """A linear layer with quantized weights, which `Projection` computes with.

    weight: of an output head the one in the model's dtype, which draft heads borrow before the model is fused; else
    None. sample: of the weights before, see `files.saving.fingerprint`; None if `weight` is there.
    """

    def __init__(self, linear: nn.Linear, packed: Packed, sample: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight if sample is None else None  # type: ignore[assignment]
        self.bias, self.dtype, self.packed, self.sample = linear.bias, linear.weight.dtype, packed, sample


class Projection(nn.Module):
    """One or several `nn.Linear` with the same input, merged into one: float [..., in] -> [..., sum of out].

    linears: all quantized or none; quantized weights are read as they are.
    memory: where weights for the C++ kernels are kept; by default wherever they are packed.
    kernel: the descriptor for the C++ kernels, or None where another implementation is used.
    """

    def __init__(self, *linears: nn.Linear, memory: LargePages | None = None) -> None:
        super().__init__()
        self.bias = None if linears[0].bias is None else _joined([layer.bias for layer in linears])
        self.num_outputs = sum(layer.out_features for layer in linears)
        self.num_inputs = linears[0].in_features
        self.kernel: cpp.Projection | None = None
        self.is_packed = self.on_gpu = False
        self.interleaved_dim: int | None = None
        self._parts: tuple[Packed, ...] = ()  # if the weights are quantized
        self.weight: Tensor
        quantized = [layer for layer in linears if isinstance(layer, QuantizedLinear)]
        if quantized:
            assert len(quantized) == len(linears), "a projection is quantized as a whole"
            self._keep_quantized(quantized, memory)
        else:
            self._lay_out(_joined([layer.weight for layer in linears]), memory)

    def _keep_quantized(self, linears: list[QuantizedLinear], memory: LargePages | None) -> None:
        """Keep quantized weights in one tensor, of which the parts are views."""
        packed = [layer.packed for layer in linears]
        assert cpp.can_join([part.num_outputs for part in packed])
        self.weight = _held(_joined([part.weights for part in packed]), memory)
        own = self.weight.split([part.weights.numel() for part in packed])
        self._parts = tuple(replace(part, weights=weights) for part, weights in zip(packed, own, strict=True))
        if cpp.available(linears[0].dtype):
            self._pad_bias()
            self.kernel = cpp.Projection.quantized(self._parts, pointer(self.bias))

    def _lay_out(self, weight: Tensor, memory: LargePages | None) -> None:
        """Keep weights [out, in] in the layout of the kernels of their device."""
        self.weight, self.on_gpu = weight, gpu.on_gpu(weight)
        if self.on_gpu:
            self.weight = weight.contiguous()
        elif cpp.supports(weight) and self.num_inputs % 2 == 0:
            self._pad_bias()
            self.weight = _held(cpp.pack(weight), memory)
            self.kernel = cpp.Projection(self.weight.data_ptr(), pointer(self.bias), self.num_inputs, self.num_outputs)
        elif weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _packs_bf16():
            rows = 8  # the number of rows that the layout is optimized for; any number works
            self.is_packed = True
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def _pad_bias(self) -> None:
        if self.bias is not None:
            self.bias = nn.functional.pad(self.bias, (0, cpp.whole_blocks(self.num_outputs) - self.num_outputs))

    def interleave(self, head_dim: int) -> None:
        """Interleave the outputs as the Triton rotary kernels expect; `forward` still returns them in order."""
        from specdec.kernels import triton_layers

        self.interleaved_dim = head_dim
        self.weight = triton_layers.interleaved(self.weight, head_dim)
        self.bias = None if self.bias is None else triton_layers.interleaved(self.bias, head_dim)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self._outputs(inputs)
        if self.interleaved_dim is None:
            return outputs
        from specdec.kernels import triton_layers

        return triton_layers.deinterleaved(outputs, self.interleaved_dim)

    def _outputs(self, inputs: Tensor) -> Tensor:
        if self.on_gpu:
            from specdec.kernels import triton_layers

            if inputs.shape[-2] <= triton_layers.MAX_WIDTH:
                product = triton_layers.product(
                    inputs.reshape(-1, self.num_inputs).contiguous(), self.weight, self.bias
                )
                return product.view(*inputs.shape[:-1], self.num_outputs)
        if self.kernel is not None:
            outputs: Tensor = inputs.new_empty(*inputs.shape[:-1], cpp.whole_blocks(self.num_outputs))
            cpp.run_projection(self.kernel, inputs.contiguous(), outputs)
            return outputs[..., : self.num_outputs]
        if self._parts:
            product = cpp.quantized_products(self._parts, inputs)
            return (product if self.bias is None else product + self.bias).to(inputs.dtype)
        if self.is_packed:
            outputs = torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")
            return outputs
        return linear(inputs, self.weight, self.bias)

    def add_to(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """residual + projection of the inputs."""
        if self.is_packed:
            outputs: Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self.weight, self.bias, "add")
            return outputs
        return residual + self.forward(inputs)


class Norm(nn.Module):
    """Root mean square normalization. norm: the transformers module; `nn.Identity` or None for no normalization.

    weight: the factors, or None without normalization. For Gemma they are 1 + w in float32, because Gemma multiplies
    before it rounds to the model's dtype, and the others after it.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight: Tensor | None = None
        self.rounds_once = type(norm).__name__.startswith("Gemma")
        self.has_kernel = False
        if norm is not None and type(norm) is not nn.Identity:
            weight = norm.weight.detach()
            self._dtype = weight.dtype
            self.weight = 1.0 + weight.float() if self.rounds_once else weight
            self.epsilon = float(norm.eps if self.rounds_once else norm.variance_epsilon)
            self.on_gpu = gpu.on_gpu(weight)
            self.has_kernel = not self.on_gpu and cpp.supports(weight) and len(weight) % 16 == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        if self.on_gpu:
            from specdec.kernels import triton_layers

            return triton_layers.rms_norm(x, self.weight, self.epsilon)
        if self.has_kernel and x.dtype == self._dtype:
            return cpp.rms_norm(x, self.weight, self.epsilon)
        # for a few rows, twice as fast as torch's composite implementation
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(length.square().div_(x.shape[-1]).add_(self.epsilon))
        return (x * scale * self.weight).to(x.dtype) if self.rounds_once else (x * scale).to(x.dtype) * self.weight


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own weights, fused or not; shared weights count once."""
    values = [value for module in modules for value in (*vars(module).values(), *module.parameters(recurse=False))]
    weights = {id(value): value for value in values if isinstance(value, Tensor)}
    return sum(weight.numel() * weight.element_size() for weight in weights.values())


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach() for tensor in tensors]) if len(tensors) > 1 else tensors[0].detach()


def _held(weight: Tensor, memory: LargePages | None) -> Tensor:
    return weight if memory is None else memory.hold(weight)


def _packs_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
