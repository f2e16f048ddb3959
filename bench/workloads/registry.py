"""Which workloads there are, how the command line names them, and reading one."""

from __future__ import annotations

import importlib
import random
from collections.abc import Sequence
from pathlib import Path

from bench.workloads.base import Malformed, Prompt

NAMES = ("humaneval", "gsm8k", "spec_bench", "sharegpt", "xsum", "cnn_dailymail", "wmt14", "smoke")


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


def read(workload: str, data_dir: Path | None, malformed: Malformed | None = None) -> list[Prompt]:
    """All prompts of a workload, or those of one of its categories.

    malformed: what is done about malformed rows; refused by default.
    Raises UnavailableError if its data are nowhere, ValueError naming file and line for a malformed row, for data
    without prompts, and for a category that they do not have.
    """
    name, category = _split(workload)
    malformed = malformed or Malformed()
    prompts = _read_all(name, data_dir, malformed)
    if not prompts:
        reason = f"; all are malformed, such as {malformed.skipped[0]}" if malformed.skipped else ""
        reason = reason or (f"; its {len(malformed.passed_over)} rows are none" if malformed.passed_over else "")
        raise ValueError(f"workloads={workload} must have at least one prompt, but its data have none{reason}")
    chosen = [prompt for prompt in prompts if category in ("", prompt.category)]
    if not chosen:
        known = ", ".join(sorted({prompt.category for prompt in prompts} - {""})) or "none"
        raise ValueError(f"workloads={workload} must name a category of {name}; it has {known}")
    return chosen


def _split(workload: str) -> tuple[str, str]:
    """(name, category or "")."""
    name, _, category = workload.partition(":")
    return (name, category) if name in NAMES else (workload, "")


def _read_all(name: str, data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    if name not in NAMES or name == "smoke":
        from bench.workloads import textfile

        return textfile.read(_smoke_file() if name == "smoke" else Path(name), malformed)
    prompts: list[Prompt] = importlib.import_module(f"bench.workloads.{name}").read(data_dir, malformed)
    return prompts


def _smoke_file() -> Path:
    return Path(__file__).parents[1] / "catalogue" / "models" / "tiny" / "smoke.txt"


def sample(prompts: Sequence[Prompt], num_prompts: int, seed: int) -> list[Prompt]:
    """Some of the prompts, drawn without replacement; the same for the same seed."""
    return random.Random(seed).sample(list(prompts), num_prompts)
