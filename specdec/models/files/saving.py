"""Writing a trained draft's folder, and the fingerprint that ties it to its target."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.models.fusion import QuantizedLinear


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write a folder's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def save_weights(folder: Path, name: str, weights: Mapping[str, Tensor]) -> None:
    """Write weights in bfloat16, and token ids and flags as they are, with the permissions of the folder's config."""
    narrow = {key: _narrowed(value).detach().cpu().contiguous() for key, value in weights.items()}
    save_file(narrow, folder / name, {"format": "pt"})
    shutil.copymode(folder / "config.json", folder / name)  # safetensors writes files readable by the owner only


def _narrowed(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() else value


def fingerprint(model: Any) -> str:
    """A hash of samples of all weights of a model, equal in float32 and bfloat16, and before and after quantization."""
    digest = hashlib.sha256()
    for shape, sample in _samples(model):
        digest.update(str(shape).encode() + sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def sample_of(weight: Tensor) -> Tensor:
    """Every n-th value of a weight in bfloat16, at most 2,047 of them."""
    return weight.detach().flatten()[:: sample_step(weight.numel())].bfloat16()


def sample_step(size: int) -> int:
    """The distance between the sampled values of a weight with so many."""
    return max(1, size // 1024)


def _samples(model: Any) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The shape and the sample of each weight, in the order of `model.parameters()`."""
    seen = set[int]()
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.sample is not None:
            yield (module.out_features, module.in_features), module.sample
        for weight in module.parameters(recurse=False):
            if id(weight) not in seen:
                seen.add(id(weight))
                yield tuple(weight.shape), sample_of(weight)
