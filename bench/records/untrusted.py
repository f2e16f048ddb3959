"""Untrusted JSON, made safe to print and to compute with."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_INTEGER = 1 << 64  # of an integer
# control characters except tabs and line ends, which may control a terminal; characters that reverse or break lines;
# and lone surrogates
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def loads(text: str) -> Any:
    """The value of a JSON text, made harmless. Raises ValueError, and RecursionError if it is nested too deeply."""
    return harmless(json.loads(text))


def harmless(value: Any) -> Any:
    """A JSON value with printable strings. Raises ValueError for integers of 2**64 and more."""
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
    """A text with Python's escapes for characters that must not reach a terminal."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
