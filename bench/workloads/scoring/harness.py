"""Runs a generated program on one input and checks what it prints or returns.

The text of this file is the head of a program that runs in the sandbox, so it imports nothing but the standard library.
Source of the rules: LiveCodeBench (Jain et al. 2024, arXiv:2403.07974), `lcb_runner/evaluation/testing_util.py`: lines
without surrounding spaces must be equal, as texts or as numbers; functions get and return JSON.
"""

import json
import os
import sys
from contextlib import suppress
from decimal import Decimal, InvalidOperation

# what LeetCode imports for its users
PRELUDE = """
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from random import *
from typing import *
import bisect, collections, datetime, functools, heapq, itertools, math, operator, random, re, string
"""


def check_program(source: str, given: str, expected: str) -> None:
    """Run a program that reads standard input; raise AssertionError unless it prints what is expected."""
    printed = _printed(source, given)
    assert same(printed, expected), f"it must print {expected[:200]!r}, but printed {printed[:200]!r}"


def check_method(source: str, name: str, given: str, expected: str) -> None:
    """Call a method of class Solution; raise AssertionError unless it returns what is expected.

    given: an argument on each line, as JSON. expected: JSON.
    """
    namespace: dict[str, object] = {"__name__": "solution"}
    exec(PRELUDE, namespace)
    exec(compile(source, "solution.py", "exec"), namespace)
    solution: object = namespace["Solution"]()  # type: ignore[operator]
    arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
    returned = json.loads(json.dumps(getattr(solution, name)(*arguments)))  # tuples are lists
    assert returned == json.loads(expected), f"it must return {expected[:200]}, but returned {str(returned)[:200]}"


def same(printed: str, expected: str) -> bool:
    """Whether two texts have the same lines."""
    lines, others = ([line.strip() for line in text.strip().splitlines()] for text in (printed, expected))
    return len(lines) == len(others) and all(
        line == other or _same_numbers(line.split(), other.split())
        for line, other in zip(lines, others)  # noqa: B905
    )


def _same_numbers(words: list[str], others: list[str]) -> bool:
    try:
        return list(map(Decimal, words)) == list(map(Decimal, others))
    except InvalidOperation:
        return False


def _printed(source: str, given: str) -> str:
    """What a program prints; its standard streams are files, however it reads and writes them."""
    with open("given", "w") as file:
        file.write(given)
    os.dup2(os.open("given", os.O_RDONLY), 0)
    os.dup2(os.open("printed", os.O_WRONLY | os.O_CREAT), 1)
    with suppress(SystemExit):
        exec(compile(source, "solution.py", "exec"), {"__name__": "__main__", "exit": sys.exit, "quit": sys.exit})
    sys.stdout.flush()
    with open("printed") as file:
        return file.read()
