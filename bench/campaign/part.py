"""One part of a campaign, measured in a separate process that hands over each finished cell at once.

Workers of a cluster import this module, so it needs nothing but the standard library and pytest.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

POLL_S = 0.5


class PartLostError(RuntimeError):
    """The process was killed, as by the system when memory runs out; its finished cells are handed over."""


@dataclass(frozen=True, slots=True)
class Started:
    """Where a part runs. process: the id of pytest's."""

    host: str
    process: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended: pytest's exit status, what it printed, and pytest-benchmark's file, empty without a cell."""

    status: int
    printed: str
    results: bytes


def measure(
    arguments: Sequence[str], variables: Mapping[str, str], finished: bytes = b"", poll_s: float = POLL_S
) -> Iterator[Started | bytes | Outcome]:
    """Run pytest with these arguments; yields where, lines of the journal as they are written, and the outcome.

    variables: of the environment, in addition. finished: lines of the journal that an earlier attempt handed over; they
    are not measured again. The process ends with the iteration.
    Raises PartLostError if it is killed.
    """
    with TemporaryDirectory() as name:
        journal, results, printed = (Path(name, each) for each in ("journal.jsonl", "results.json", "printed"))
        journal.write_bytes(finished)
        command = [sys.executable, "-m", "bench.campaign.part", *arguments, "--resume"]
        command += [f"--journal={journal}", f"--benchmark-json={results}"]
        with (
            printed.open("wb") as output,
            subprocess.Popen(
                command, env=os.environ | dict(variables), stdout=output, stderr=subprocess.STDOUT
            ) as process,
        ):
            try:
                yield Started(socket.gethostname(), process.pid)
                yield from _lines(process, journal, len(finished), poll_s)
            finally:
                process.kill()
        text = printed.read_text(errors="replace")
        if process.returncode < 0:
            raise PartLostError(f"pytest was killed by {signal.Signals(-process.returncode).name}: {text[-1000:]}")
        yield Outcome(process.returncode, text, results.read_bytes() if results.exists() else b"")


def _lines(process: subprocess.Popen[bytes], journal: Path, num_bytes: int, poll_s: float) -> Iterator[bytes]:
    """Complete lines that are appended to a journal after its first bytes, until the process ends."""
    has_ended = False
    while not has_ended:
        has_ended = process.poll() is not None  # before the journal is read: nothing is written after
        content = journal.read_bytes()
        complete = content[num_bytes : content.rfind(b"\n") + 1]
        if complete:
            yield complete
            num_bytes += len(complete)
        if not has_ended:
            time.sleep(poll_s)


def main() -> None:
    """Run pytest, and end with the process that started this one."""
    import pytest

    from bench.engines.workers.protocol import end_with_parent

    end_with_parent()
    sys.exit(pytest.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
