"""LiveCodeBench (Jain et al. 2024, arXiv:2403.07974): problems of programming contests, each with its tests.

Rows with `question_content`, `starter_code`, `difficulty`, `public_test_cases` and `private_test_cases`, from files
that the user has: the problems belong to their contests, so there is only this reader. Private tests are JSON, or JSON
that was pickled, compressed and written in base64, as the hub has it. Programs are run with one thread.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from bench.workloads.base import Cases, Malformed, Prompt, find_some, prompts_of
from bench.workloads.sources import rows_of
from specdec.prompts import text_of

NAME = "livecodebench"
FILES = ("livecodebench*.jsonl", "code_generation_lite/test*.jsonl", "livecodebench/**/test*.jsonl")
PROGRAM = (
    "Write a Python program that reads the input from standard input and prints the answer. Put the whole program into "
    "one ```python block."
)
METHOD = "Complete this class, and put the whole of it into one ```python block."


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The problems of all such files in the data folder; the difficulty is the category."""
    paths = find_some(data_dir, NAME, *FILES)
    return [prompt for path in paths for prompt in prompts_of(rows_of(path, malformed), _prompt, malformed)]


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    question, starter = text_of(row, "question_content", place), str(row.get("starter_code") or "")
    cases = [case for name in ("public_test_cases", "private_test_cases") for case in _cases(row, name, place)]
    if not cases:
        raise ValueError(f"{place}: the tests must have at least one case; correct or remove the row")
    kinds = {case.get("testtype", "stdin") for case in cases}
    if kinds not in ({"stdin"}, {"functional"}):
        raise ValueError(f"{place}: testtype={sorted(kinds)} must be stdin or functional; correct or remove the row")
    method = _method(row, place) if kinds == {"functional"} else ""
    asked = f"{METHOD}\n```python\n{starter.strip()}\n```" if method else PROGRAM
    pairs = tuple((text_in(case, "input", place), text_in(case, "output", place)) for case in cases)
    return Prompt(f"{question}\n\n{asked}", str(row.get("difficulty", "")), truth=Cases(pairs, method))


def text_in(case: dict[str, Any], name: str, place: str) -> str:
    """A text of a test, which may be empty."""
    value = case.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{place}: {name}={value!r:.40} of a test must be a text; correct or remove the row")
    return value


def _method(row: dict[str, Any], place: str) -> str:
    metadata = row.get("metadata") or "{}"
    try:
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata)["func_name"]
    except (ValueError, KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{place}: metadata must name the method in func_name; correct or remove the row")
    return name


def _cases(row: dict[str, Any], name: str, place: str) -> Iterator[dict[str, Any]]:
    text = row.get(name) or "[]"
    try:
        cases = _decoded(text) if isinstance(text, str) else text
    except (ValueError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, RecursionError) as error:
        raise ValueError(
            f"{place}: {name} must be a list of tests as JSON ({error}); correct or remove the row"
        ) from None
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"{place}: {name} must be a list of tests; correct or remove the row")
    yield from cases


def _decoded(text: str) -> Any:
    if text.lstrip().startswith("["):
        return json.loads(text)
    return json.loads(_TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load())


class _TextOnly(pickle.Unpickler):
    """Reads a pickled text; a pickle that needs a class or a function could run code, and is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it must hold a text, but needs {module}.{name}")
