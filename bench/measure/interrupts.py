"""Ctrl-C that Python would lose: KeyboardInterrupt in a weak reference's callback or in `__del__` is only reported.

Without this module the cell would go on, or fail for another reason, although it was interrupted.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """A context manager that raises KeyboardInterrupt at its end if Ctrl-C was pressed, whatever else was raised.

    It does nothing where the process ignores Ctrl-C, as in a shell's background, or has another handler for it.
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
