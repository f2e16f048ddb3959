"""Ctrl-C, which Python can lose: raised in a callback of a weak reference or in `__del__` it is only reported there.

The cell then goes on, or fails by what the report or a worker's own end makes of it; but it did not fail, it was
interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context manager that ends with KeyboardInterrupt, whatever else was raised, if Ctrl-C came.

    Where the process ignores Ctrl-C, as in a shell's background, or somebody else handles it, nothing changes.
    """

    def __enter__(self) -> Self:
        self._came, self._report = False, sys.unraisablehook
        self._handler = signal.getsignal(signal.SIGINT)
        if self._handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        sys.unraisablehook = self._report
        if self._handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handler)
        if self._came and kind is not KeyboardInterrupt:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._came = True
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            self._report(lost)
