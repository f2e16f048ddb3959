"""Any file: JSON lines with `prompt` and an optional `category`, or of a trace, or plain text, one prompt a line."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from bench.workloads import trace
from bench.workloads.base import Malformed, Prompt, prompts_of
from specdec.prompts import rows, text_lines, text_of


def read(path: Path, malformed: Malformed) -> list[Prompt]:
    """All prompts of a file; .jsonl, .json and .gz files are JSON lines, others plain text.

    Raises ValueError naming the line of a malformed row.
    """
    is_json = path.suffix in (".jsonl", ".json", ".gz")
    if not is_json:
        return _plain_lines(path)
    numbers = count()

    def make(row: dict[str, Any], place: str) -> Prompt:
        return trace.prompt_of(row, place, next(numbers)) if trace.is_request(row) else _prompt(row, place)

    return prompts_of(rows(path, malformed.meet), make, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    return Prompt(text_of(row, "prompt", place), str(row.get("category", "")))


def _plain_lines(path: Path) -> list[Prompt]:
    return [Prompt(line) for line in text_lines(path) if line.strip()]
