"""Weights of a loaded model in 8 or 4 bits, for the kernels of this CPU.

The weights in a GGUF file are taken as they are, so the model's distribution is that of the dequantized file up to
rounding. Quantizing other weights changes it; speculation is then lossless with respect to the quantized model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from specdec.kernels import cpp
from specdec.kernels.quantized import GROUP, Quantized, pack
from specdec.models.fusion import QuantizedLinear
from specdec.models.fusion.anatomy import is_fusable
from specdec.models.gguf.codes import quantize
from specdec.models.gguf.stored import StoredWeights
from specdec.runtime.artifacts import WrongArgumentError

_OF_HEAD = "Q8_0"  # an output head in 4 bits costs more quality than it saves time; llama.cpp keeps it wider, too


def quantize_model(model: Any, name: str, stored: StoredWeights | None) -> None:
    """Quantize the linear layers of a model, in place; `fuse` then packs only the quantized weights.

    name: one of OWN_QUANTIZATIONS: "auto" takes weights as they are stored, and leaves those that are stored as plain
    numbers; a type takes those that are stored in it and quantizes the others to it, but an output head at least to 8
    bits. stored: of the GGUF file that the model is from, or None.
    Raises WrongArgumentError if the kernels do not support the model, its dtype or its device.
    """
    _check(model, name)
    linears, num_quantized = list(_linears(model)), 0
    for parent, attribute, path in linears:
        linear = getattr(parent, attribute)
        quantized = _quantized(linear, path, name, stored, is_head=parent is model)
        if quantized is not None:
            setattr(parent, attribute, QuantizedLinear(linear, pack(quantized)))
            num_quantized += 1
    logging.getLogger("specdec").info(
        "quantization=%s: %d of %d linear layers are quantized", name, num_quantized, len(linears)
    )


def _check(model: Any, name: str) -> None:
    rule = f"quantization={name!r} requires"
    layers = getattr(model.base_model, "layers", [])
    if model.device.type != "cpu" or not cpp.multiplies_quantized():
        raise WrongArgumentError(
            f"{rule} this package's kernels for CPUs, but there are none for device={str(model.device)!r}; leave it "
            "out, or use Linux, a C++ compiler and device='cpu'"
        )
    if not layers or not all(map(is_fusable, layers)):
        raise WrongArgumentError(
            f"{rule} layers that this package's kernels compute, but {type(model).__name__} has others; leave it out"
        )


def _linears(model: Any) -> Iterator[tuple[Any, str, str]]:
    """The linear layers that `fuse` replaces: the module that holds each, its name there, and its full name."""
    prefix = model.base_model_prefix
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (name.startswith(f"{prefix}.layers.") or "." not in name):
            parent, _, attribute = name.rpartition(".")
            yield model.get_submodule(parent), attribute, name


def _quantized(
    linear: nn.Linear, path: str, name: str, stored: StoredWeights | None, *, is_head: bool
) -> Quantized | None:
    kind = name.upper()
    if stored is not None and (name == "auto" or stored.kind_of(path) == kind):
        as_stored = stored.read(path, linear.weight)
        if as_stored is not None or name == "auto":
            return as_stored
    if name == "auto":
        return None
    if linear.in_features % GROUP:
        raise WrongArgumentError(
            f"quantization={name!r} requires layers with a multiple of {GROUP} inputs, but {path} has "
            f"{linear.in_features}; leave it out"
        )
    return quantize(linear.weight, _OF_HEAD if is_head else kind)
