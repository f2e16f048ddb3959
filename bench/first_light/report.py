"""Facts, each written to disk at once as one JSON line, and the table that summarizes them."""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

FACTS_FILE = "first_light.jsonl"
_TRACEBACK_CHARS = 1500  # kept from the end of a traceback
_TABLE_CHARS = 11_000
_PART_CHARS = 2400  # of the table, per part
_LAST = ("transformers", "real", "shapes-135m", "shapes-8b", "correctness")  # the most important parts come last

Fact = dict[str, Any]


class Report:
    """Appends facts of one part to a file; several processes may share the file.

    part: its name. path: of the JSON lines.
    """

    def __init__(self, part: str, path: Path) -> None:
        self.part, self.path = part, path
        self._doing = "start"

    def fact(self, name: str, /, text: str = "", **values: Any) -> None:
        """Record a fact. text: its line in the table; empty to omit it there."""
        self._write({"fact": name, **({"text": text} if text else {})}, values)

    def check(self, name: str, ok: bool, /, detail: str = "", **values: Any) -> None:
        """Record the outcome of a check."""
        self._write({"check": name, "ok": ok, "detail": detail}, values)

    def skip(self, name: str, reason: str) -> None:
        """Record that something cannot be done on this machine."""
        self._write({"skipped": name, "detail": reason})

    def attempt(self, name: str) -> Attempt:
        """A context that records an exception as a failed check called `name`, and suppresses it.

        If the device itself failed, the part ends, because nothing else can be measured in this process.
        """
        self._doing = name
        return Attempt(self, name)

    def took(self, name: str, seconds: float) -> None:
        """Record a duration."""
        self._write({"took": name, "seconds": round(seconds, 3)})

    def watch_fallbacks(self) -> None:
        """Record every later warning of specdec as a failed check.

        specdec warns when it falls back to something slower, such as after a failed graph capture or compilation.
        """
        logging.getLogger("specdec").addHandler(_Fallbacks(self))

    def fallback(self, message: str) -> None:
        """Record a warning of specdec as a failed check."""
        self.check(f"no fallback during {self._doing}", False, message)

    def _write(self, fact: Fact, values: Mapping[str, Any] = MappingProxyType({})) -> None:
        fact = {"part": self.part, "at_s": round(time.time(), 2), **fact}
        for name in fact.keys() & values.keys():
            raise ValueError(f"{name}={values[name]!r} must not be the name of a value; rename it")
        line = json.dumps({**fact, **values}, default=str)
        with self.path.open("ab", buffering=0) as stream:  # a single write: lines of several processes do not mix
            stream.write(line.encode() + b"\n")
            os.fsync(stream.fileno())


class Attempt:
    """The context manager of `Report.attempt`."""

    def __init__(self, report: Report, name: str) -> None:
        self._report, self._name, self._start_s = report, name, time.perf_counter()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        try:
            if isinstance(error, Exception):
                self._fail(error)
        finally:
            self._report.took(self._name, time.perf_counter() - self._start_s)
        return isinstance(error, Exception)

    def _fail(self, error: Exception) -> None:
        import torch

        trace = "".join(traceback.format_exception(error))
        self._report.check(self._name, False, _reason(error), traceback=trace[-_TRACEBACK_CHARS:])
        if isinstance(error, torch.AcceleratorError):
            raise SystemExit(f"{self._name}: the device failed: {_reason(error)}") from error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()


class _Fallbacks(logging.Handler):
    def __init__(self, report: Report) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.fallback(record.getMessage())


def read(path: Path) -> list[Fact]:
    """All facts of a file, without incomplete lines."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    facts = []
    for line in lines:
        try:
            facts.append(json.loads(line))
        except ValueError:
            continue
    return facts


def table(facts: Sequence[Fact]) -> str:
    """A summary by part, failed checks last in each, of at most 11,000 characters."""
    parts = list(dict.fromkeys(fact["part"] for fact in facts))
    parts.sort(key=lambda part: _LAST.index(part) if part in _LAST else -1)
    texts = [_clipped(_lines([fact for fact in facts if fact["part"] == part]), _PART_CHARS) for part in parts]
    return "\n".join([*texts, _summary(facts)])[-_TABLE_CHARS:]


def num_failed(facts: Iterable[Fact]) -> int:
    """The number of failed checks."""
    return sum(fact.get("ok") is False for fact in facts)


def _lines(facts: Sequence[Fact]) -> list[str]:
    checks = [fact for fact in facts if "check" in fact]
    failed = [fact for fact in checks if not fact["ok"]]
    title = f"== {facts[0]['part']}" + (f": {len(checks) - len(failed)} of {len(checks)} checks hold" if checks else "")
    skipped = [f"skipped {fact['skipped']}: {fact['detail']}" for fact in facts if "skipped" in fact]
    texts = [fact["text"] for fact in facts if "text" in fact]
    return [title, *texts, *skipped, *(f"FAILED {fact['check']}: {fact['detail']}"[:240] for fact in failed)]


def _clipped(lines: Sequence[str], num_chars: int) -> str:
    """The lines, without as many in the middle as exceed the number of characters."""
    kept = list(lines)
    while sum(map(len, kept)) + len(kept) > num_chars and len(kept) > 2:
        kept.pop(len(kept) // 2)
    if len(kept) < len(lines):
        kept.insert(len(kept) // 2, f"... {len(lines) - len(kept)} more lines in {FACTS_FILE}")
    return "\n".join(kept)


def _summary(facts: Sequence[Fact]) -> str:
    ends = [fact for fact in facts if fact.get("fact") == "end"]
    parts = ", ".join(f"{fact['of']} {fact['outcome']} in {fact['seconds']:.0f} s" for fact in ends)
    num_checks = sum("check" in fact for fact in facts)
    return f"== parts: {parts}\n== {num_checks - num_failed(facts)} of {num_checks} checks hold"


def _reason(error: Exception) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"
