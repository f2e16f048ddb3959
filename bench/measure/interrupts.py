"""Keeps Ctrl-C from being lost: Python only reports a KeyboardInterrupt in a weakref callback or in `__del__`.

Without this module, an interrupted cell would continue, or fail for another reason.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context manager that raises KeyboardInterrupt on exit if Ctrl-C was pressed, even after another exception.

    Does nothing if the process ignores SIGINT, as background jobs of a shell do, or has another handler for it.
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
