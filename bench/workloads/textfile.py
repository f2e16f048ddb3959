"""Any file: JSON lines with `prompt` and an optional `category`, or plain text, one prompt a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, prompts_of
from specdec.prompts import rows, text_lines, text_of


def read(path: Path, malformed: Malformed) -> list[Prompt]:
    """All prompts of a file; .jsonl, .json and .gz files are JSON lines, others plain text.

    Raises ValueError naming the line of a malformed row.
    """
    is_json = path.suffix in (".jsonl", ".json", ".gz")
    return prompts_of(rows(path, malformed.meet), _prompt, malformed) if is_json else _plain_lines(path)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    return Prompt(text_of(row, "prompt", place), str(row.get("category", "")))


def _plain_lines(path: Path) -> list[Prompt]:
    return [Prompt(line) for line in text_lines(path) if line.strip()]
