"""Programs that check generated code, to be run in the sandbox: they reach their end if the code is right."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from bench.workloads.base import Cases, UnitTest
from bench.workloads.scoring.extraction import code_of, function_of


def of_function(test: UnitTest, text: str) -> str:
    """The function in an output, or the prompt's head continued by the output, and its test."""
    code = function_of(text, test.entry_point, test.head)
    return f"{code}\n{test.test}\ncheck({test.entry_point})\n"


def of_cases(cases: Cases, text: str) -> Iterator[str]:
    """A program for each case; the output's code is run on its input."""
    code = code_of(text)
    for given, expected in cases.cases:
        call = (
            f"check_method({code!r}, {cases.method!r}, {given!r}, {expected!r})"
            if cases.method
            else f"check_program({code!r}, {given!r}, {expected!r})"
        )
        yield f"{_harness()}\n{call}\n"


@cache
def _harness() -> str:
    return Path(__file__).with_name("harness.py").read_text(encoding="utf-8")
