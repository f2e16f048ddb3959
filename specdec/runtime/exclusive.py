"""A generator that has something for itself until it ends."""

from __future__ import annotations

from collections.abc import Callable, Generator
from threading import Lock
from typing import Any, TypeVar

T = TypeVar("T")


class EngineBusyError(RuntimeError):
    """An engine is asked to decode while another call of it is not finished."""


class Exclusive(Generator[T]):
    """A generator made by `start` that holds a lock until it is finished, closed or dropped.

    Raises EngineBusyError if the lock is held.
    """

    def __init__(self, lock: Lock, start: Callable[[], Generator[T]]) -> None:
        self._lock: Lock | None = None
        if not lock.acquire(blocking=False):
            raise EngineBusyError(
                "this engine is decoding for another call, whose stream is not finished or which is in another thread; "
                "finish or close() that one first, give all prompts in one call, or load another engine"
            )
        self._lock = lock
        try:
            self._items = start()
        except BaseException:
            self._release()
            raise

    def send(self, value: Any) -> T:
        try:
            return self._items.send(value)
        except BaseException:
            self.close()
            raise

    def throw(self, *error: Any) -> T:
        try:
            return self._items.throw(*error)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._lock:
            self._items.close()
            self._release()

    def __del__(self) -> None:
        self.close()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock:
            lock.release()
