"""A progress bar for the running cell, on the line below pytest's own; it disappears when the cell is done."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any, TextIO

from bench.records.schema import Cell
from specdec.runtime.progress import bar

NOWHERE = io.StringIO()  # not a terminal, so no bars are drawn


class LineBelow(io.TextIOBase):
    """The line below a terminal's cursor, which stays where it is. terminal: closed with this stream."""

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    @property
    def encoding(self) -> str:  # type: ignore[override]  # tqdm chooses its characters by it
        return self._terminal.encoding

    def write(self, text: str) -> int:
        # down and up again scrolls at the end of the screen; then save the cursor, draw the line, restore the cursor
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
    """The stream for progress bars: the line below pytest's if stdout is a terminal, else NOWHERE.

    Must be called before pytest captures output, because it duplicates the file descriptor.
    """
    if not stdout.isatty() or environment.get("TERM", "dumb") == "dumb":
        return NOWHERE
    terminal = os.fdopen(os.dup(stdout.fileno()), "w", encoding="utf-8")
    return LineBelow(terminal)  # type: ignore[return-value]


def cell_bar(cell: Cell, total: int, unit: str, file: TextIO) -> Any:
    """A progress bar for a cell. file: from `line_below`."""
    return bar(total, unit, f"{cell.engine} {cell.method} {cell.gamma}", file=file)
