"""The folder of a drafting head: its config and its tensors, whose shapes are known before any is read.

Dialects are made alike here: a speculators config is merged with the layer config that it wraps, and prefixes that only
say which module of a training program held the head are dropped from tensor names. Weights are safetensors; pickled
ones are read only where the caller allows it, and then without running what they may contain.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from specdec.runtime.artifacts import LoadError
from specdec.runtime.json_files import fields, read_json

T = TypeVar("T")

VOCABULARY_FILE = "draft_vocabulary.json"  # in our own folders
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PREFIXES = ("module.", "draft_model.", "speculator.", "medusa_heads.", "model.")  # dropped, each once, in this order


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is. name: in that file, with its prefix. dtype: as safetensors names it, "BF16"."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_weight(self) -> bool:
        """Whether it holds weights, not token ids or flags."""
        return self.dtype not in ("I64", "I32", "BOOL")

    def empty(self) -> Tensor:
        """A tensor without content, on the "meta" device."""
        return torch.empty(self.shape, dtype=_DTYPES[self.dtype], device="meta")


@dataclass(frozen=True, slots=True)
class HeadFolder:
    """A head's folder.

    config: of config.json; of a speculators folder merged with its `transformer_layer_config`, which is then left out.
    files: where each tensor is, by its name without `PREFIXES`.
    only_shapes: whether reading weights gives tensors without content, on the "meta" device; token ids are still read.
    """

    path: Path
    config: dict[str, Any]
    files: dict[str, Stored]
    only_shapes: bool = False

    @classmethod
    def open(cls, path: Path, *, allow_pickle: bool = False) -> HeadFolder:
        """Read config and shapes; no tensor is read.

        allow_pickle: whether weights may be `.bin` or `.pt` files, where there are no safetensors.
        Raises ValueError for a config that is not a JSON object, PickleError for weights that are only pickled and not
        allowed, and LoadError for weights that are missing or damaged.
        """
        config = flattened(dict(read_json(path / CONFIG, "config must be a JSON object", fields)))
        stored = [each for file in weight_files(path, allow_pickle) for each in _headers(file)]
        return cls(path, config, _without_prefixes(path, stored))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        return {name: stored.shape for name, stored in self.files.items()}

    @property
    def target_name(self) -> str | None:
        """The model that the head was trained for, as its config names it, None if it does not."""
        verifier = (self.config.get("speculators_config") or {}).get("verifier") or {}
        named = (self.config.get(key) for key in ("target_model_name_or_path", "base_model_name_or_path"))
        return next((name for name in (verifier.get("name_or_path"), *named) if name), None)

    def read(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Tensors by name: those of these names that there are, None for all.

        Raises LoadError for damaged files, and for quantized weights.
        """
        wanted = {name: stored for name, stored in self.files.items() if names is None or name in names}
        for name, stored in wanted.items():
            if stored.dtype not in _DTYPES:
                raise LoadError(
                    f"{name!r} of the head {str(self.path)!r} is stored as {stored.dtype}, but must be one of "
                    f"{', '.join(_DTYPES)}: quantized heads are not supported; use the unquantized one"
                )
        empty = {name: stored for name, stored in wanted.items() if self.only_shapes and stored.is_weight}
        tensors = {name: stored.empty() for name, stored in empty.items()}
        return tensors | _stored({name: stored for name, stored in wanted.items() if name not in empty})

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """These rows of a tensor; no others are read."""
        stored = self.files[name]

        def read() -> Tensor:
            if stored.file.suffix != ".safetensors":
                return _unpickled(stored.file, "cpu")[stored.name][list(rows)]
            with safe_open(stored.file, "pt") as opened:
                part = opened.get_slice(stored.name)
                return torch.cat([part[row : row + 1] for row in rows])

        return _explained(stored.file, read)


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class PickleError(LoadError):
    """Weights that are only there as a pickle, which the caller did not allow."""


def flattened(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of its `transformer_layer_config`, where its own keys go first.

    Source: vllm-project/speculators `src/speculators/config.py`. `model_type` is that of the layers.
    """
    inner = config.get("transformer_layer_config")
    if not isinstance(inner, Mapping):
        return config
    own = {key: value for key, value in config.items() if key != "transformer_layer_config"}
    return dict(inner) | own | {"model_type": inner.get("model_type", own.get("model_type"))}


# ---- which files hold the weights


def weight_files(path: Path, allow_pickle: bool = False) -> list[Path]:
    """The files with the tensors of a folder: safetensors if there are any, else pickled ones.

    Raises PickleError for pickled ones that are not allowed, and LoadError if there are none, or if an index names
    files of another kind or outside the folder.
    """
    found = _of_kind(path, WEIGHTS, INDEX, (".safetensors",))
    if not found:
        found = _of_kind(path, PICKLED, PICKLED_INDEX, (".bin", ".pt"))
        if found and not allow_pickle:
            raise PickleError(
                f"{found[0].name!r} in {str(path)!r} must be .safetensors, as a pickle can hold code; convert it, or "
                "load it all the same with allow_pickle=True (--allow-pickle), which reads tensors and runs nothing"
            )
    if not found:
        raise LoadError(f"{str(path)!r} must hold {WEIGHTS}, or shards of it with {INDEX}; copy them there")
    return found


def _of_kind(path: Path, name: str, index: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of one kind: those of the index, else the usual one, else the only one of that kind."""
    if (path / index).is_file():
        return _indexed(path, index, suffixes)
    if (path / name).is_file():
        return [path / name]
    others = sorted(file for file in path.iterdir() if file.suffix in suffixes and file.is_file())
    return others if len(others) == 1 else []


def _indexed(path: Path, index: str, suffixes: tuple[str, ...]) -> list[Path]:
    rule = "index must be a JSON file with a weight_map from tensors to files"
    names = read_json(path / index, rule, lambda value: sorted(set(map(str, fields(value["weight_map"]).values()))))
    for name in names:
        if not name.endswith(suffixes) or Path(name).name != name:
            raise LoadError(
                f"{index} of {str(path)!r} names {name!r}, but must name {' or '.join(suffixes)} files in its own "
                "folder; copy the checkpoint again"
            )
    return [path / name for name in names]


def _without_prefixes(path: Path, stored: Iterable[Stored]) -> dict[str, Stored]:
    """Tensors by name without prefixes; a prefix stays where two tensors would have one name without it."""
    files: dict[str, Stored] = {}
    for each in stored:
        if each.name in files:
            raise LoadError(
                f"{each.name!r} is twice in {str(path)!r}: in {files[each.name].file.name!r} and "
                f"{each.file.name!r}; remove one"
            )
        files[each.name] = each
    for prefix in PREFIXES:
        shorter = {name.removeprefix(prefix): each for name, each in files.items()}
        files = shorter if len(shorter) == len(files) else files
    return files


# ---- reading a file of either kind


def _headers(file: Path) -> list[Stored]:
    """What a file holds; no tensor is read."""
    if file.suffix != ".safetensors":
        tensors = _explained(file, partial(_unpickled, file, "meta"))
        return [Stored(file, key, tuple(each.shape), _dtype_name(each)) for key, each in tensors.items()]

    def read() -> list[Stored]:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return [Stored(file, name, tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()]

    return _explained(file, read)


def _dtype_name(tensor: Tensor) -> str:
    return _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def _stored(wanted: Mapping[str, Stored]) -> dict[str, Tensor]:
    """Tensors by name, each file opened once."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({stored.file for stored in wanted.values()}):
        here = {name: stored.name for name, stored in wanted.items() if stored.file == file}
        tensors |= _explained(file, partial(_read, file, here))
    return tensors


def _read(file: Path, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a file. names: {as returned: as stored}."""
    if file.suffix != ".safetensors":
        tensors = _unpickled(file, "cpu")
        return {name: tensors[stored].clone() for name, stored in names.items()}  # not a view of a mapped file
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(stored) for name, stored in names.items()}


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory if it is of the format that can be."""
    loaded = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    if isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    others = [name for name, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{others[0]!r} in it is a {type(loaded[others[0]]).__name__}, not a tensor")
    return dict(loaded)


def _explained(file: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except Exception as error:  # safetensors raises its own type, which it does not export everywhere
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"{str(file)!r} must be an undamaged file of tensors ({cause}); copy it again") from error
