"""An open-loop client: sends requests at their arrival times, whether or not earlier ones have finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import BoundedSemaphore, Event, Lock
from typing import Generic, TypeVar

from specdec.servers.errors import BusyError, EngineError

MAX_IN_FLIGHT = 256  # requests, each with a thread and a connection
ABORT_PERIOD_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """The outcome of requests. results: None for those refused or unfinished.

    refused: indices. wall_s: until the last request finished, or the time limit. peak_delay_s: of sending a request.
    """

    results: tuple[T | None, ...]
    refused: frozenset[int]
    wall_s: float
    peak_delay_s: float


def send_on_time(
    call: Callable[[int, float], T], arrivals_s: Sequence[float], limit_s: float, abort: Callable[[], None]
) -> Sent[T]:
    """Make a call at each arrival, in seconds from now.

    call: (index, due time by time.perf_counter) -> result; raises BusyError if the request is refused. abort: aborts
    the calls in flight, which then raise EngineError; used at `limit_s` and after a failure.
    Beyond MAX_IN_FLIGHT calls in flight, requests are refused here. They are not queued, because then a slow engine
    would slow down the arrivals.
    Raises the first other EngineError of a call.
    """
    flight = _Flight(call, time.perf_counter())
    with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
        try:
            calls = flight.send(threads, arrivals_s)
            flight.wait(calls, limit_s)
        finally:
            flight.end(abort)
    wall_s = time.perf_counter() - flight.start_s
    if flight.error:
        raise flight.error
    return Sent(tuple(map(_result, calls)), frozenset(flight.refused), wall_s, flight.peak_delay_s)


def _result(call: Future[T | None] | None) -> T | None:
    return call.result() if call else None


class _Flight(Generic[T]):
    """The calls in flight."""

    def __init__(self, call: Callable[[int, float], T], start_s: float) -> None:
        self.start_s, self.peak_delay_s = start_s, 0.0
        self.refused: set[int] = set()
        self.error: EngineError | None = None
        self._call, self._lock = call, Lock()
        self._free, self._failed = BoundedSemaphore(MAX_IN_FLIGHT), Event()
        self._num_out, self._is_over = 0, False

    def send(self, threads: ThreadPoolExecutor, arrivals_s: Sequence[float]) -> list[Future[T | None] | None]:
        """Start each call when it is due, until one has failed."""
        calls: list[Future[T | None] | None] = []
        for index, arrival_s in enumerate(arrivals_s):
            due_s = self.start_s + arrival_s
            if self._failed.wait(max(0.0, due_s - time.perf_counter())):
                break
            if self._free.acquire(blocking=False):
                with self._lock:
                    self._num_out += 1
                calls.append(threads.submit(self._make, index, due_s))
            else:
                self._refuse(index)
                calls.append(None)
        return calls

    def wait(self, calls: Sequence[Future[T | None] | None], limit_s: float) -> None:
        """Wait until all calls are done, one has failed, or the time limit."""
        end_s = self.start_s + limit_s
        while not self._failed.is_set() and (left_s := end_s - time.perf_counter()) > 0:
            out = next((call for call in calls if call and not call.done()), None)
            if out is None:
                return
            self._failed.wait(min(left_s, ABORT_PERIOD_S))

    def end(self, abort: Callable[[], None]) -> None:
        """Abort the calls in flight, repeatedly, because a call may not have connected yet."""
        self._is_over = True
        while self._num_out:
            abort()
            time.sleep(ABORT_PERIOD_S)

    def _make(self, index: int, due_s: float) -> T | None:
        with self._lock:
            self.peak_delay_s = max(self.peak_delay_s, time.perf_counter() - due_s)
        try:
            return None if self._is_over else self._call(index, due_s)
        except BusyError:
            self._refuse(index)
        except EngineError as error:
            self._fail(error)
        finally:
            with self._lock:
                self._num_out -= 1
            self._free.release()
        return None

    def _refuse(self, index: int) -> None:
        with self._lock:
            self.refused |= set() if self._is_over else {index}

    def _fail(self, error: EngineError) -> None:
        with self._lock:
            if not self._is_over:
                self.error = self.error or error
        self._failed.set()
