"""Untrusted JSON, made safe to print and to compute with."""

from __future__ import annotations

import json
from typing import Any

from specdec.runtime.printable import printable

MAX_INTEGER = 1 << 64  # of an integer


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
