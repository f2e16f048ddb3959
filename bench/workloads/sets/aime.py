"""AIME, the American Invitational Mathematics Examination: answers are integers from 0 to 999.

Rows with `problem` or `question`, `answer` and perhaps `year`, from files of JSON lines or Parquet that the user has:
the problems belong to the Mathematical Association of America, so there is only this reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Number, Prompt, find_some, prompts_of
from bench.workloads.sets.math500 import BOXED
from bench.workloads.sources import rows_of
from specdec.prompts import text_of

NAME = "aime"
FILES = ("aime*.jsonl", "AIME*.jsonl", "aime*.parquet", "aime*/**/*.jsonl", "aime*/**/*.parquet")
LARGEST = 999


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The problems of all such files in the data folder; those of a year, else of a file, are a category."""
    paths = find_some(data_dir, NAME, *FILES)

    def make(row: dict[str, Any], place: str) -> Prompt:
        problem = text_of(row, "problem" if "problem" in row else "question", place)
        category = str(row.get("year") or Path(place.rpartition(":")[0]).stem)
        truth = Number(str(_answer(row.get("answer"), place)))
        return Prompt(problem + BOXED, category, raw=f"Problem: {problem}\nSolution:", truth=truth)

    return [prompt for path in paths for prompt in prompts_of(rows_of(path, malformed), make, malformed)]


def _answer(value: Any, place: str) -> int:
    text = str(value).strip()
    if not (text.isdecimal() and int(text) <= LARGEST):
        raise ValueError(f"{place}: answer={value!r} must be an integer from 0 to {LARGEST}; correct or remove the row")
    return int(text)
