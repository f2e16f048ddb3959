"""The workloads by name, how the command line names them, and reading one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.workloads import random_tokens, textfile
from bench.workloads.base import Malformed, Prompt
from bench.workloads.sets import (
    aime,
    cnn_dailymail,
    gsm8k,
    humaneval,
    livecodebench,
    math500,
    mbpp,
    mt_bench,
    sharegpt,
    spec_bench,
    speed_bench,
    wmt14,
    xsum,
)
from specdec.runtime import extensions
from specdec.runtime.checks import nearest

Reader = Callable[[Path | None, Malformed], list[Prompt]]  # (data folder, what is done about malformed rows)
GROUP: extensions.Group = "specdec.workloads"
SMOKE_FILE = Path(__file__).parents[1] / "catalogue" / "models" / "tiny" / "smoke.txt"
READERS: dict[str, Reader] = {
    "humaneval": humaneval.read,
    "gsm8k": gsm8k.read,
    "math500": math500.read,
    "aime": aime.read,
    "mbpp": mbpp.read,
    "livecodebench": livecodebench.read,
    "spec_bench": spec_bench.read,
    "mt_bench": mt_bench.read,
    **speed_bench.READERS,
    **random_tokens.READERS,
    "sharegpt": sharegpt.read,
    "xsum": xsum.read,
    "cnn_dailymail": cnn_dailymail.read,
    "wmt14": wmt14.read,
    "smoke": lambda data_dir, malformed: textfile.read(SMOKE_FILE, malformed),
}


def parse_workloads(name: str, text: str) -> tuple[str, ...]:
    """`NAME,...`, where an item may also be NAME:CATEGORY, a file or an extension, which is imported.

    Raises ValueError for anything else.
    """
    items = tuple(item.strip() for item in text.split(","))
    for item in items:
        if _reader(_split(item)[0]) is None:
            rule = f"must be {', '.join(READERS)}, module:attribute or an existing file"
            raise ValueError(f"{name}={item!r} {rule}{nearest(item, READERS) or '; check the path'}")
    if len({label(item) for item in items}) < len(items):
        raise ValueError(f"{name}={text!r} must be distinct, also without folder and suffix; rename a file")
    return items


def label(workload: str) -> str:
    """What a workload is called in results: its name, or its file's without folder and suffix."""
    name, _ = _split(workload)
    return workload if name in READERS or extensions.is_extension(GROUP, name) else Path(workload).stem


def read(workload: str, data_dir: Path | None, malformed: Malformed | None = None) -> list[Prompt]:
    """All prompts of a workload, or those of one of its categories.

    malformed: what is done about malformed rows; refused by default.
    Raises UnavailableError if its data are nowhere, ValueError naming file and line for a malformed row, for data
    without prompts, and for a category that they do not have; ExtensionError for an extension that cannot be used.
    """
    name, category = _split(workload)
    malformed = malformed or Malformed()
    reader = _reader(name)
    if reader is None:
        raise ValueError(f"workloads={workload} must be an existing file; check the path")
    prompts = reader(data_dir, malformed)
    if not prompts:
        reason = f"; all are malformed, such as {malformed.skipped[0]}" if malformed.skipped else ""
        reason = reason or (f"; its {len(malformed.passed_over)} rows are none" if malformed.passed_over else "")
        raise ValueError(f"workloads={workload} must have at least one prompt, but its data have none{reason}")
    chosen = [prompt for prompt in prompts if category in ("", prompt.category)]
    if not chosen:
        known = sorted({prompt.category for prompt in prompts} - {""})
        rule = f"must name a category of {name}; it has {', '.join(known) or 'none'}"
        raise ValueError(f"workloads={workload} {rule}{nearest(category, known)}")
    return chosen


def _split(workload: str) -> tuple[str, str]:
    """(name, category or ""); a file has no category."""
    reference = extensions.REFERENCE.match(workload)
    name = workload.partition(":")[0]
    if name not in READERS and name not in extensions.entry_points(GROUP):
        name = reference[0] if reference and not Path(workload).is_file() else workload
    category = workload.removeprefix(name)
    return (name, category[1:]) if category[:1] in ("", ":") else (workload, "")


def _reader(name: str) -> Reader | None:
    """None for what is no name, no extension and no file. Raises ExtensionError for one that cannot be used."""
    if name in READERS:
        return READERS[name]
    if name not in extensions.entry_points(GROUP) and Path(name).is_file():
        return lambda data_dir, malformed: textfile.read(Path(name), malformed)
    if not extensions.is_extension(GROUP, name):
        return None
    reader: Reader = extensions.load(GROUP, name, callable, "a function (data_dir, malformed) -> list[Prompt]")
    return partial(_read_extension, name, reader)


def _read_extension(name: str, reader: Reader, data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    prompts = reader(data_dir, malformed)
    if not isinstance(prompts, list) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise extensions.ExtensionError(
            f"{GROUP}: {name!r} must return a list of bench.workloads.base.Prompt, but it returned {prompts!r:.80}; "
            "return [Prompt(text), ...]"
        )
    return prompts


def sample(prompts: Sequence[Prompt], num_prompts: int, seed: int) -> list[Prompt]:
    """Some of the prompts, drawn without replacement; the same for the same seed."""
    return random.Random(seed).sample(list(prompts), num_prompts)
