"""Any file: JSON lines with `prompt` or `messages` and an optional `category`, or of a trace, or one prompt a line."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from bench.workloads import trace
from bench.workloads.base import Malformed, Prompt, prompts_of
from specdec.prompts import rows, text_lines, text_of, whole


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
    category = whole(str(row.get("category", "")), f"{place}: category")
    if "messages" in row:
        messages = _messages(row["messages"], place)
        return Prompt(messages[-1][1], category, messages=messages)
    return Prompt(text_of(row, "prompt", place), category)


def _messages(value: Any, place: str) -> tuple[tuple[str, str], ...]:
    """Role and content of each message, as in OpenAI's chat completions; the last is the user's or a tool's."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise ValueError(f"{place}: messages={value!r:.40} must be a list of messages; correct or remove the row")
    messages = tuple((text_of(each, "role", place), text_of(each, "content", place)) for each in value)
    if messages[-1][0] not in ("user", "tool"):
        raise ValueError(
            f"{place}: messages must end with the user's, not with {messages[-1][0]}'s; correct or remove the row"
        )
    return messages


def _plain_lines(path: Path) -> list[Prompt]:
    return [Prompt(line) for line in text_lines(path) if line.strip()]
