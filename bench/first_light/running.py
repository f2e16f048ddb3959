"""Runs each part as a process with a time limit, so that a crash never loses the results of other parts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bench.first_light.report import FACTS_FILE, Report

ARCHIVE_FILE = "logs.tar.gz"
_GRACE_S = 8.0  # between asking a part to stop and killing it
_POLL_S = 0.1  # between looks at whether the visit was interrupted
_MIN_S = 5.0  # a part with less time left is skipped
_LOG_CHARS = 1500  # characters of a failed part's log that are stored as a fact
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Part:
    """A command with a time limit in seconds; {facts} in it is replaced by the path of the facts file."""

    name: str
    command: tuple[str, ...]
    limit_s: float


def part(name: str, limit_s: float, device: str) -> Part:
    """A part of this package."""
    return Part(name, (sys.executable, "-m", "bench.first_light.part", name, "{facts}", device), limit_s)


class Interrupts:
    """While entered, SIGINT and SIGTERM set `came` instead of raising an exception.

    An exception would be lost if it were raised in the callback of a weak reference, and would leave a part running if
    it were raised while its process is started. Signals that the process ignores stay ignored.
    """

    def __init__(self) -> None:
        self.came = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.came = True


def run_parts(parts: Sequence[Part], folder: Path, budget_s: float, interrupts: Interrupts) -> None:
    """Run the parts sequentially within a time budget, and write their facts to `folder`.

    The folder holds FACTS_FILE, ARCHIVE_FILE with the logs of finished parts, and the log of the current part. An
    interrupt stops the current part as its limit does, and no other part is started.
    """
    report, ends_s = Report("visit", folder / FACTS_FILE), time.monotonic() + budget_s
    for part in parts:
        if interrupts.came:
            return
        limit_s = min(part.limit_s, ends_s - time.monotonic())
        if limit_s < _MIN_S:
            report.skip(part.name, f"{limit_s:.0f} s were left of the budget of {budget_s:.0f} s")
            continue
        _run(part, limit_s, folder, report, interrupts)


def _run(part: Part, limit_s: float, folder: Path, report: Report, interrupts: Interrupts) -> None:
    log, start_s, outcome = folder / f"{part.name}.log", time.monotonic(), "could not be started"
    command = [word.format(facts=folder / FACTS_FILE) for word in part.command]
    try:
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                preexec_fn=_accept_interrupts,
            )
            try:
                outcome = _wait(process, limit_s, interrupts)
            finally:
                _stop(process)
    finally:
        seconds = round(time.monotonic() - start_s, 1)
        report.fact("end", of=part.name, outcome=outcome, seconds=seconds)
        if outcome != "ended":
            tail = log.read_text(errors="replace")[-_LOG_CHARS:] if log.exists() else ""
            last = next(reversed(tail.strip().splitlines()), "")
            report.check(f"{part.name} ends by itself", False, f"{outcome}; {last}", log=tail)
        _archive(log, folder / ARCHIVE_FILE)


def _accept_interrupts() -> None:
    """Reset SIGINT: a shell makes background jobs ignore it, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait(process: subprocess.Popen[bytes], limit_s: float, interrupts: Interrupts) -> str:
    """How a part ended, or why it has to be stopped."""
    ends_s = time.monotonic() + limit_s
    while time.monotonic() < ends_s:
        if interrupts.came:
            return "was interrupted"
        with contextlib.suppress(subprocess.TimeoutExpired):
            return _outcome(process.wait(_POLL_S))
    return f"was stopped at its limit of {limit_s:.0f} s"


def _outcome(status: int) -> str:
    if status == 0:
        return "ended"
    return f"died of {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the process group of a part, so that it can write its results; then kill what is still running."""
    if process.poll() is None:
        _signal(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    _signal(process, signal.SIGKILL)  # even after a normal end: children may still be running
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _archive(log: Path, archive: Path) -> None:
    """Move a log into the archive, which is replaced atomically."""
    staging = archive.with_suffix(".new")
    with tarfile.open(staging, "w:gz") as new:
        if archive.exists():
            with tarfile.open(archive) as old:
                for member in old:
                    new.addfile(member, old.extractfile(member))
        if log.exists():
            new.add(log, log.name)
    os.replace(staging, archive)
    log.unlink(missing_ok=True)
