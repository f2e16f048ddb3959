"""The folder of a drafting head: its config and its tensors, whose shapes are known before any is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from specdec.runtime.artifacts import LoadError
from specdec.runtime.json_files import fields, read_json

VOCABULARY_FILE = "draft_vocabulary.json"  # in our own folders
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class HeadFolder:
    """A head's folder. config: of config.json. files: where each tensor is. shapes: of each tensor."""

    path: Path
    config: dict[str, Any]
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def open(cls, path: Path) -> HeadFolder:
        """Read config and shapes.

        Raises ValueError for a config that is not a JSON object, and LoadError for damaged weights.
        """
        config = dict(read_json(path / CONFIG, "config must be a JSON object", fields))
        files, shapes = {}, {}
        for file in _weight_files(path):
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  # not a mapping
                        files[name], shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
            except Exception as error:  # safetensors raises its own type, which it does not export everywhere
                raise LoadError(f"{str(file)!r} must be a safetensors file ({error}); copy it again") from error
        return cls(path, config, files, shapes)

    def read(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(self.files.values())):
            with safe_open(file, "pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name, place in self.files.items() if place == file}
        return tensors


def _weight_files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        names = read_json(path / INDEX, "index must have a weight_map", lambda value: fields(value["weight_map"]))
        return sorted({path / name for name in names.values()})
    return [path / WEIGHTS]
