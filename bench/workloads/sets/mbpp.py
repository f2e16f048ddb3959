"""MBPP (Austin et al. 2021, arXiv:2108.07732): short Python functions with three assertions each. CC-BY-4.0.

Rows with `text` or `prompt`, `code` and `test_list`, and perhaps `test_imports` or `test_setup_code`, from a file of
JSON lines, a JSON array (the sanitized set) or Parquet.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, UnitTest, find, prompts_of
from bench.workloads.sources import rows_of
from specdec.prompts import array_rows, text_of

NAME = "mbpp"
FILES = ("mbpp*.jsonl", "mbpp*.parquet", "sanitized-mbpp*.json")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The problems of a file in the data folder."""
    path = find(data_dir, NAME, *FILES)
    rows = array_rows(path, malformed.meet) if path.suffix == ".json" else rows_of(path, malformed)
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    task, code = text_of(row, "text" if "text" in row else "prompt", place), text_of(row, "code", place)
    tests = _lines(row, "test_list", place)
    if not tests:
        raise ValueError(f"{place}: test_list must have an assertion; correct or remove the row")
    setup = [*_lines(row, "test_imports", place), str(row.get("test_setup_code") or "")]
    body = "\n".join(f"    {line}" for test in tests for line in test.splitlines())
    test = "\n".join([*filter(None, setup), f"def check(candidate):\n{body}"])
    shown = "\n".join(tests)
    text = f"{task}\n\nAnswer with a Python function that passes these tests:\n```python\n{shown}\n```"
    raw = f'"""\n{task}\n{shown}\n"""\n'
    return Prompt(text, "code", raw=raw, truth=UnitTest("", test, _entry_point(code, tests[0], place)))


def _lines(row: dict[str, Any], name: str, place: str) -> list[str]:
    value = row.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{place}: {name}={value!r:.40} must be a list of lines; correct or remove the row")
    return value


def _entry_point(code: str, test: str, place: str) -> str:
    """The function of the code that a test calls."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
        names = [node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)]
    except SyntaxError as error:
        raise ValueError(f"{place}: code and test_list must be Python ({error}); correct or remove the row") from None
    found = next((name for name in names if name in defined), None)
    if found is None:
        raise ValueError(f"{place}: test_list must call a function of code; correct or remove the row")
    return found
