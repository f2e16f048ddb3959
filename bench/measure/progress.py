"""Progress of a cell while pytest runs it: a bar on the line below pytest's own, which goes when the cell is done."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, TextIO

from bench.records.schema import Cell
from specdec.runtime.progress import bar

NOWHERE = io.StringIO()  # is no terminal, so nothing is drawn on it


class LineBelow(io.TextIOBase):
    """The line below the cursor of a terminal: what is written there leaves the cursor where it was.

    terminal: is closed with it.
    """

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]  # by which tqdm chooses its characters
        return self._terminal.encoding

    def write(self, text: str) -> int:
        # down and up again makes room at the screen's end; then the place is saved, the line drawn, the place restored
        self._terminal.write(f"\033D\033M\0337\033[B{text}\0338")
        return len(text)

    def flush(self) -> None:
        if not self.closed:
            self._terminal.flush()

    def isatty(self) -> bool:
        return self._terminal.isatty()

    def fileno(self) -> int:
        return self._terminal.fileno()

    def close(self) -> None:
        super().close()
        self._terminal.close()


def line_below(stdout: TextIO, environment: Mapping[str, str] = os.environ) -> TextIO:
    """Where bars are drawn: below the line that pytest is writing on a terminal, else nowhere.

    To be called while pytest does not capture: what is captured later is the file number, not the terminal.
    """
    if not stdout.isatty() or environment.get("TERM", "dumb") == "dumb":
        return NOWHERE
    terminal = os.fdopen(os.dup(stdout.fileno()), "w", encoding="utf-8")
    return LineBelow(terminal)  # type: ignore[return-value]


def cell_bar(cell: Cell, total: int, unit: str, file: TextIO) -> Any:
    """A bar for what a cell has to do; file: of `line_below`."""
    return bar(total, unit, f"{cell.engine} {cell.method} {cell.gamma}", file=file)
