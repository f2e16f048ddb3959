"""JSON that somebody else wrote, made harmless before it is shown: on a terminal, in a table, in arithmetic."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_INTEGER = 1 << 64  # of an integer
# control characters but tabs and ends of lines: they move a terminal's cursor, or more; and characters that turn or
# break lines, or are half a character
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def loads(text: str) -> Any:
    """The value of a JSON text, made harmless. Raises ValueError, and RecursionError for what is nested too deeply."""
    return harmless(json.loads(text))


def harmless(value: Any) -> Any:
    """A value out of JSON, its strings as they can be printed. Raises ValueError for integers beyond arithmetic."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [harmless(each) for each in value]
    if isinstance(value, dict):
        return {printable(name): harmless(each) for name, each in value.items()}
    if isinstance(value, int) and abs(value) >= MAX_INTEGER:
        raise ValueError("an integer must be below 2**64")
    return value


def printable(text: str) -> str:
    """A text with escapes, as Python writes them, for what is not to reach a terminal."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
