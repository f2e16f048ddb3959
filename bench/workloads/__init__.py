"""The prompts that are measured: named data sets and files. Each reader returns all prompts of its source."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAMES = ("humaneval", "gsm8k", "spec_bench", "smoke")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. text: what the user says. category: what the source files it under, or ""."""

    text: str
    category: str = ""


class UnavailableError(ValueError):
    """A workload whose data are not here; the message says where to get them."""


def parse_workloads(name: str, text: str) -> tuple[str, ...]:
    """`NAME,...`, where an item may also be NAME:CATEGORY or a file. Raises ValueError for anything else."""
    items = tuple(item.strip() for item in text.split(","))
    for item in items:
        if _split(item)[0] not in NAMES and not Path(item).is_file():
            raise ValueError(f"{name}={item!r} must be {', '.join(NAMES)} or an existing file; check the path")
    if len({label(item) for item in items}) < len(items):
        raise ValueError(f"{name}={text!r} must be distinct, also without folder and suffix; rename a file")
    return items


def label(workload: str) -> str:
    """What a workload is called in results: its name, or its file's without folder and suffix."""
    return workload if _split(workload)[0] in NAMES else Path(workload).stem


def read(workload: str, data_dir: Path | None) -> list[Prompt]:
    """All prompts of a workload, or those of one of its categories.

    Raises UnavailableError if its data are nowhere, ValueError naming file and line for a malformed row, and for a
    category that it does not have.
    """
    name, category = _split(workload)
    prompts = _read_all(name, data_dir)
    chosen = [prompt for prompt in prompts if category in ("", prompt.category)]
    if not chosen:
        known = ", ".join(sorted({prompt.category for prompt in prompts} - {""})) or "none"
        raise ValueError(f"workloads={workload} must name a category of {name}; it has {known}")
    return chosen


def _split(workload: str) -> tuple[str, str]:
    """(name, category or "")."""
    name, _, category = workload.partition(":")
    return (name, category) if name in NAMES else (workload, "")


def _read_all(name: str, data_dir: Path | None) -> list[Prompt]:
    if name not in NAMES or name == "smoke":
        from bench.workloads import textfile

        return textfile.read(_smoke_file() if name == "smoke" else Path(name))
    prompts: list[Prompt] = importlib.import_module(f"bench.workloads.{name}").read(data_dir)
    return prompts


def sample(prompts: Sequence[Prompt], num_prompts: int, seed: int) -> list[Prompt]:
    """Some of the prompts, drawn without replacement; the same for the same seed."""
    return random.Random(seed).sample(list(prompts), num_prompts)


def find(data_dir: Path | None, workload: str, *patterns: str) -> Path:
    """The file of a workload in the data folder. Raises UnavailableError if there is none or more than one."""
    found = sorted({path for pattern in patterns for path in data_dir.glob(pattern)}) if data_dir else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UnavailableError(
            f"workloads={workload} must have one file {' or '.join(patterns)} in "
            f"data_dir={data_dir}, found {names}; name its folder with --data-dir"
        )
    return found[0]


def _smoke_file() -> Path:
    return Path(__file__).parents[1] / "tiny" / "smoke.txt"
