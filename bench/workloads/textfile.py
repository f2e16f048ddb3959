"""Any file: JSON lines with `prompt` and an optional `category`, or plain text, one prompt a line."""

from __future__ import annotations

from pathlib import Path

from bench.workloads import Prompt
from specdec.prompts import rows, text_of


def read(path: Path) -> list[Prompt]:
    """All prompts of a file; .jsonl, .json and .gz files are JSON lines, others plain text.

    Raises ValueError naming the line of a malformed row, or a file without prompts.
    """
    prompts = _json_lines(path) if path.suffix in (".jsonl", ".json", ".gz") else _plain_lines(path)
    if not prompts:
        raise ValueError(f"{path}: must hold at least one prompt; name another file")
    return prompts


def _json_lines(path: Path) -> list[Prompt]:
    return [Prompt(text_of(row, "prompt", place), str(row.get("category", ""))) for place, row in rows(path)]


def _plain_lines(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be UTF-8 text ({error}); convert it") from None
    return [Prompt(line) for line in lines if line.strip()]
