"""Prompts and the ground truth they are scored by; how a workload is named, read and sampled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specdec.prompts import text_of

Lengths = tuple[int, int]  # least and most tokens of a prompt
BUCKET = re.compile(r"(?P<label>.*)@(?P<least>\d+):(?P<most>\d+)")


@dataclass(frozen=True, slots=True)
class Number:
    """A prompt that is answered by this number. text: as the source writes it."""

    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A prompt that is answered by something like this text."""

    text: str


@dataclass(frozen=True, slots=True)
class UnitTest:
    """A prompt that is answered by a Python function.

    head: code up to the function's body. test: code that defines `check(function)`. entry_point: the function's name.
    """

    head: str
    test: str
    entry_point: str


@dataclass(frozen=True, slots=True)
class Formula:
    """A prompt that is answered by a formula equal to this one, in LaTeX."""

    text: str


@dataclass(frozen=True, slots=True)
class Cases:
    """A prompt that is answered by a Python program or a method.

    cases: inputs, each with its output. method: of a class `Solution`, which gets and returns JSON; "" for a program
    that reads standard input and prints.
    """

    cases: tuple[tuple[str, str], ...]
    method: str = ""


Truth = Number | Summary | UnitTest | Formula | Cases


@dataclass(frozen=True, slots=True)
class Drawn:
    """A prompt of random tokens.

    number: its own, from 0. num_tokens: its length. group, num_shared: which prompts begin with the same tokens, and
    with how many. blocks: ids of consecutive blocks of tokens, equal for equal tokens; empty if it is drawn by itself.
    """

    number: int
    num_tokens: int
    group: int = 0
    num_shared: int = 0
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. text: what the user says. category: what the source files it under, or "".

    raw: a text to go on with, for models that are not talked to; "" is `text`. truth: what the output is scored by.
    messages: role and content of a whole conversation, which `text` sums up; its last answer is the model's.
    earlier, later: what the user says before and after it in the same conversation; the model's own answers stand in
    between. Readers give the first turn with the later ones; `turns_of` makes a prompt of each turn.
    drawn: how to draw a prompt of random tokens, whose text is only its name.
    arrival_s, max_tokens: of a request of a trace, from the trace's start, and the tokens of its answer.
    """

    text: str
    category: str = ""
    raw: str = ""
    truth: Truth | None = None
    earlier: tuple[str, ...] = field(default=(), repr=False)  # the digest of a run's prompts adds it where there is any
    later: tuple[str, ...] = field(default=(), repr=False)
    drawn: Drawn | None = field(default=None, repr=False)
    messages: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    arrival_s: float | None = field(default=None, repr=False)
    max_tokens: int | None = field(default=None, repr=False)

    @property
    def turn(self) -> int:
        """1 for the first question of a conversation."""
        return len(self.earlier) + 1

    @property
    def opening(self) -> str:
        """The first question of its conversation, which identifies the conversation."""
        return self.earlier[0] if self.earlier else self.text


def turns_of(prompt: Prompt) -> list[Prompt]:
    """The turns of a conversation, one prompt each; only the first is scored, if at all."""
    texts = (prompt.text, *prompt.later)
    later = (Prompt(text, prompt.category, earlier=texts[:index]) for index, text in enumerate(texts) if index)
    return [replace(prompt, later=()), *later]


@dataclass(frozen=True, slots=True)
class Malformed:
    """What is done about malformed rows. policy: "refuse" the file, or "skip" the row. skipped: why, row by row.

    passed_over: the places of sound rows that hold no prompt, such as a dialogue that begins with an answer.
    """

    policy: str = "refuse"
    skipped: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    def meet(self, error: ValueError) -> None:
        """Raise the error, or note it."""
        if self.policy == "refuse":
            raise error
        self.skipped.append(str(error))


class UnavailableError(ValueError):
    """A workload whose data are not here; the message says where to get them."""


def buckets(label: str, lengths: Sequence[Lengths]) -> list[str]:
    """What a workload's cells are called: as the workload, or, of several buckets of lengths, LABEL@LEAST:MOST each."""
    return [label] if len(lengths) < 2 else [f"{label}@{least}:{most}" for least, most in lengths]


def bucket(name: str, lengths: Sequence[Lengths]) -> tuple[str, Lengths | None]:
    """Of a cell's workload the label and the lengths of its prompts, as `buckets` put them together; None is any."""
    if len(lengths) < 2:
        return name, next(iter(lengths), None)
    found = BUCKET.fullmatch(name)
    assert found, f"{name} is one of several buckets"
    return found["label"], (int(found["least"]), int(found["most"]))


def prompts_of(
    rows: Iterable[tuple[str, dict[str, Any]]],
    make: Callable[[dict[str, Any], str], Prompt | None],
    malformed: Malformed,
) -> list[Prompt]:
    """The prompts that `make` makes of rows with their places; None if a row is none, ValueError if malformed."""
    prompts = []
    for place, row in rows:
        try:
            prompt = make(row, place)
        except ValueError as error:
            malformed.meet(error)
        else:
            if prompt:
                prompts.append(prompt)
            else:
                malformed.passed_over.append(place)
    return prompts


def conversation(row: dict[str, Any], place: str, category: str) -> Prompt:
    """The prompt of a row with `turns`, the user's questions. Raises ValueError naming the place for another row."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{place}: turns={turns!r} must be a list with a question; correct or remove the row")
    first, *later = (text_of({f"turns[{n}]": turn}, f"turns[{n}]", place) for n, turn in enumerate(turns))
    return Prompt(first, category, later=tuple(later))


def find_all(data_dir: Path | None, *patterns: str) -> list[Path]:
    """The files of the data folder that have such names."""
    return sorted({path for pattern in patterns for path in data_dir.glob(pattern)}) if data_dir else []


def find_some(data_dir: Path | None, workload: str, *patterns: str) -> list[Path]:
    """The files of a workload in the data folder. Raises UnavailableError if there is none."""
    found = find_all(data_dir, *patterns)
    if not found:
        raise UnavailableError(
            f"workloads={workload} must have a file {' or '.join(patterns)} in data_dir={data_dir}, found none; name "
            "its folder with --data-dir"
        )
    return found


def find(data_dir: Path | None, workload: str, *patterns: str) -> Path:
    """The file of a workload in the data folder. Raises UnavailableError if there is none or more than one."""
    found = find_all(data_dir, *patterns)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UnavailableError(
            f"workloads={workload} must have one file {' or '.join(patterns)} in "
            f"data_dir={data_dir}, found {names}; name its folder with --data-dir"
        )
    return found[0]
