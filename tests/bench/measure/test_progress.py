"""A cell's bar: below the line that pytest writes, and gone when the cell is done; nothing of it in logs."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from helpers.terminal import Terminal

from bench.measure.cells.audit import Audited
from bench.measure.progress import NOWHERE, cell_bar, line_below
from bench.records.schema import Cell
from specdec import SamplingParams

ROOT = Path(__file__).parents[3]
CELL = Cell("specdec", "tiny-random", "ngram", 2, "same", "smoke", 1)
BELOW = re.compile(r"\033D\033M\0337\033\[B(.*?)\0338", re.DOTALL)


def test_the_cursor_comes_back_to_where_it_was() -> None:
    terminal = Terminal()
    terminal.stream.write("dots ..")
    line = line_below(terminal.stream, {"TERM": "xterm"})
    terminal.stream.flush()
    with cell_bar(CELL, 4, "run", line) as done:
        done.update(1)
        done.refresh()
        shown = terminal.shown()
    assert shown.startswith("dots ..\033D")
    assert BELOW.sub("", shown) == "dots .."
    assert "specdec ngram 2:  25%" in BELOW.findall(shown)[-1]
    left = BELOW.findall(terminal.shown())
    assert left[-2].strip() == ""
    assert left[-1] == "\r"
    line.close()
    terminal.close()


def test_where_pytest_writes_to_no_terminal_nothing_is_drawn() -> None:
    terminal = Terminal()
    assert line_below(io.StringIO(), {"TERM": "xterm"}) is NOWHERE
    assert line_below(terminal.stream, {"TERM": "dumb"}) is NOWHERE
    with line_below(terminal.stream, {"TERM": "xterm"}) as line:
        assert line.isatty()
    terminal.close()
    with cell_bar(CELL, 4, "run", NOWHERE) as done:
        done.update(4)
        done.refresh()
    assert NOWHERE.getvalue() == ""


def test_pytest_shows_it_past_its_capture(tmp_path: Path, environment: dict[str, str]) -> None:
    terminal, log = Terminal(), tmp_path / "log"
    command = [sys.executable, "-m", "pytest", "bench/", "--smoke", "--device", "cpu", "-q", "-p", "no:cacheprovider"]
    only = ["--engines", "specdec", "--methods", "ngram", "--journal", str(tmp_path / "journal.jsonl")]
    variables = environment | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as stderr:
        process = subprocess.Popen([*command, *only], cwd=ROOT, env=variables, stdout=terminal.stream, stderr=stderr)
        shown = ""
        while process.poll() is None:
            shown += terminal.shown()
            time.sleep(0.02)
    shown += terminal.shown()
    terminal.close()
    bars = BELOW.findall(shown)
    assert any("specdec ngram 2:   0%" in each and "0/4" in each for each in bars)  # two prompts, two arms
    assert bars[-2].strip() == ""
    assert "1 passed" in BELOW.sub("", shown)
    assert (process.returncode, log.read_bytes()) == (0, b"")


def test_an_audit_reports_its_progress() -> None:
    class Engine:
        def generate(self, prompts, method, gamma, sampling):
            return SimpleNamespace(results=[SimpleNamespace(token_ids=(1, 2, 3), counts=None) for _ in prompts])

    reported: list[int] = []
    audited = Audited(Engine(), CELL, SamplingParams(), reported.append)  # type: ignore[arg-type]
    audited.speculative([[1], [2]], [0, 1], 3)
    audited.plain([[1], [2]], [0, 1], 3)
    assert reported == [6]
