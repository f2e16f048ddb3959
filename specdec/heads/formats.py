"""The registry of head formats: how each is recognized by its config and tensors, and loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.heads import eagle, medusa, mlp_speculator
from specdec.heads.files import HeadFolder
from specdec.runtime.artifacts import LoadError


@dataclass(frozen=True, slots=True)
class HeadFormat:
    """A checkpoint format.

    name: also that of its method. recognize: the dialect of a folder of this format ("SpecForge"), None for any other
    folder. load: of (folder, the transformers target, load_format as `load_pretrained` takes it) makes the head, in
    the target's dtype and on its device; raises LoadError for a damaged folder and ValueError for another target's.
    """

    name: str
    recognize: Callable[[HeadFolder], str | None]
    load: Callable[[HeadFolder, Any, str], Any]


FORMATS: tuple[HeadFormat, ...] = (
    HeadFormat("eagle", eagle.recognize, eagle.load),
    HeadFormat("medusa", medusa.recognize_medusa, medusa.load_medusa),
    HeadFormat("hydra", medusa.recognize_hydra, medusa.load_hydra),
    HeadFormat("mlp_speculator", mlp_speculator.recognize, mlp_speculator.load),
)


def recognized(path: Path) -> tuple[HeadFormat, HeadFolder] | None:
    """The format of the head in a folder, and what was read of it; None if there is no head in it.

    Raises LoadError for a damaged folder.
    """
    if not (path / "config.json").is_file():
        return None
    try:
        folder = HeadFolder.open(path)
    except (LoadError, ValueError):
        return None  # the loader of models says what is wrong
    return next(((each, folder) for each in FORMATS if each.recognize(folder) is not None), None)
