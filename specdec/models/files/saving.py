"""Writing a trained draft's folder, and the fingerprint that ties it to its target."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


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
    """A hash of samples of all weights of a model, equal in float32 and bfloat16."""
    digest = hashlib.sha256()
    for weight in model.parameters():
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 1024)]
        digest.update(str(tuple(weight.shape)).encode() + sample.bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
