"""Models whose linear layers have weights in 8 or 4 bits, for the CPU kernels.

The weights in a GGUF file are taken as they are, so the model's distribution is that of the dequantized file up to
rounding. Quantizing other weights changes it; speculation is then lossless with respect to the quantized model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import cpp
from specdec.kernels.quantized import GROUP, Quantized, dequantize, pack
from specdec.models.files.saving import sample_of
from specdec.models.fusion import QuantizedLinear
from specdec.models.fusion.anatomy import Anatomy, is_fusable
from specdec.models.gguf.stored import StoredWeights
from specdec.models.quantization.quantizers import OF_HEAD, quantize
from specdec.runtime.artifacts import WrongArgumentError

_STORED = "stored"


class Quantization:
    """How the linear layers of a model are quantized: each as it is in the model's GGUF file, by a quantizer, or not.

    Layers that `fuse` merges into one projection are quantized together or not at all.

    model: of transformers; may be on the meta device. name: one of OWN_QUANTIZATIONS: "auto" takes weights as they are
    stored, and leaves those that are stored as plain numbers; a GGUF type takes those that are stored in it and
    quantizes the others, the output head to at least 8 bits. stored: the weights of the model's GGUF file, or None.
    Raises WrongArgumentError if the kernels do not support the model or the device.
    """

    def __init__(self, model: Any, name: str, stored: StoredWeights | None, device: torch.device) -> None:
        _check(model, name, device)
        self._name, self._stored = name, stored
        self._sources: dict[str, str] = {}  # path of a quantized layer -> _STORED or a quantizer
        self._num_linears = 0
        for projection in _projections(model):
            self._num_linears += len(projection)
            sources = {path: self._source_of(path, linear) for path, linear in projection.items()}
            if None not in sources.values() and cpp.can_join([each.out_features for each in projection.values()]):
                self._sources |= sources  # type: ignore[arg-type]

    @property
    def unread(self) -> set[str]:
        """Names of weights that need not be in the model, because their blocks are read from the file.

        Without the output head's, which draft heads borrow in the model's dtype.
        """
        return {f"{path}.weight" for path, source in self._sources.items() if source == _STORED and "." in path}

    def quantize(self, model: Any) -> None:
        """Replace the layers, in place; `fuse` then packs only the quantized weights."""
        for path, source in self._sources.items():
            linear = model.get_submodule(path)
            sample = self._sample(path, source, linear) if "." in path else None
            packed = pack(self._quantized(path, source, linear))
            _replace(model, path, QuantizedLinear(linear, packed, sample))
        logging.getLogger("specdec").info(
            "quantization=%s: %d of %d linear layers are quantized", self._name, len(self._sources), self._num_linears
        )

    def dequantize(self, model: Any) -> None:
        """Give the layers the values of their quantized weights, in place, and the whole model the dtype float32.

        It has the distribution of the quantized model, computed without kernels for quantized weights.
        """
        model.float()
        for path, source in self._sources.items():
            linear = model.get_submodule(path)
            values = dequantize(self._quantized(path, source, linear))
            dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            dense.weight, dense.bias = nn.Parameter(values, requires_grad=False), linear.bias
            _replace(model, path, dense)

    def _source_of(self, path: str, linear: nn.Linear) -> str | None:
        kind = self._stored.readable_kind(path) if self._stored else None
        if kind is not None and self._name in ("auto", kind.lower()):
            return _STORED
        if self._name == "auto":
            return None
        _check_inputs(self._name, path, linear)
        return self._name if "." in path else OF_HEAD.get(self._name, self._name)

    def _quantized(self, path: str, source: str, linear: nn.Linear) -> Quantized:
        if source != _STORED:
            return quantize(linear.weight, source)
        assert self._stored is not None
        return self._stored.read(path)

    def _sample(self, path: str, source: str, linear: nn.Linear) -> Tensor:
        if source != _STORED:
            return sample_of(linear.weight)
        assert self._stored is not None
        return self._stored.sample(path).to(linear.weight.dtype).bfloat16()


def quantize_layers(module: nn.Module, name: str) -> None:
    """Quantize the linear layers of all decoder layers in a module, in place. name: of QUANTIZERS.

    Raises WrongArgumentError without kernels for it, and for a number of inputs that is no multiple of 32.
    """
    for layer in [each for each in module.modules() if is_fusable(each)]:
        for projection in _projections_of(layer, {each: path for path, each in layer.named_modules()}):
            if cpp.can_join([linear.out_features for linear in projection.values()]):
                for path, linear in projection.items():
                    _replace(layer, path, quantized(linear, name, path))


def quantized(linear: nn.Linear, name: str, path: str = "lm_head") -> QuantizedLinear:
    """A linear layer with its weights quantized; raises as `quantize_layers`. path: for the error message."""
    _check_kernels(name, linear.weight.device)
    _check_inputs(name, path, linear)
    return QuantizedLinear(linear, pack(quantize(linear.weight, name)), sample_of(linear.weight))


def _check(model: Any, name: str, device: torch.device) -> None:
    _check_kernels(name, device)
    layers = getattr(model.base_model, "layers", [])
    if not layers or not all(map(is_fusable, layers)):
        raise WrongArgumentError(
            f"quantization={name!r} requires layers that this package's kernels compute, but {type(model).__name__} "
            "has others; leave it out"
        )


def _check_kernels(name: str, device: torch.device) -> None:
    if device.type != "cpu" or not cpp.multiplies_quantized():
        raise WrongArgumentError(
            f"quantization={name!r} requires this package's kernels for CPUs, but there are none for "
            f"device={str(device)!r}; leave it out, or use Linux, a C++ compiler and device='cpu'"
        )


def _check_inputs(name: str, path: str, linear: nn.Linear) -> None:
    if linear.in_features % GROUP:
        raise WrongArgumentError(
            f"quantization={name!r} requires layers with a multiple of {GROUP} inputs, but {path} has "
            f"{linear.in_features}; leave it out"
        )


def _projections(model: Any) -> Iterator[dict[str, nn.Linear]]:
    """The linear layers that `fuse` merges into each projection, by path; the output head's has no dot."""
    paths = {module: path for path, module in model.named_modules()}
    for layer in model.base_model.layers:
        yield from _projections_of(layer, paths)
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            yield {name: child}


def _projections_of(layer: Any, paths: Mapping[nn.Module, str]) -> Iterator[dict[str, nn.Linear]]:
    anatomy = Anatomy.of(layer)
    for linears in (anatomy.qkv, (anatomy.output,), anatomy.gate_up, (anatomy.down,)):
        yield {paths[linear]: linear for linear in linears}


def _replace(model: Any, path: str, module: nn.Module) -> None:
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
