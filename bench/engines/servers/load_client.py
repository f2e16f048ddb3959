"""A client that sends requests at their arrival times, whether or not earlier ones have finished."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from threading import Condition
from typing import Generic, TypeVar

from bench.engines.following import Following
from specdec.servers.errors import BusyError, EngineError

MAX_IN_FLIGHT = 256  # requests, each with a thread and a connection
ABORT_PERIOD_S = 0.05

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """The outcome of requests. results: None for those refused or unfinished.

    refused: indices. wall_s: until the last request finished, or the time limit. peak_delay_s: of sending a request.
    arrivals_s: when each request was due; None for one that was not due in time, which has no result.
    """

    results: tuple[T | None, ...]
    refused: frozenset[int]
    wall_s: float
    peak_delay_s: float
    arrivals_s: tuple[float | None, ...]


def send_on_time(
    call: Callable[[int, float], T],
    arrivals_s: Sequence[float],
    limit_s: float,
    abort: Callable[[], None],
    *,
    after: Sequence[int | None] | None = None,
    until_s: float = math.inf,
) -> Sent[T]:
    """Make a call at each arrival, in seconds from now or, for a request that follows another, from its answer.

    call: (index, due time by time.perf_counter) -> result; raises BusyError if the request is refused. Results measure
    from the due time, so that a client or server that falls behind does not hide it. abort: aborts the calls in flight,
    which then raise EngineError; used at `limit_s` and after a failure. after, until_s: as for `Following`.
    Beyond MAX_IN_FLIGHT calls in flight, requests are refused here. They are not queued, because then a slow engine
    would slow down the arrivals.
    Raises the first other EngineError of a call.
    """
    flight = _Flight(call, Following(arrivals_s, after, until_s), time.perf_counter())
    with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
        try:
            flight.send(threads, limit_s)
        finally:
            flight.end(abort)
    wall_s = time.perf_counter() - flight.start_s
    if flight.error:
        raise flight.error
    return flight.sent(wall_s)


class _Flight(Generic[T]):
    """The calls in flight. What is shared with their threads is changed while `_changed` is held."""

    def __init__(self, call: Callable[[int, float], T], following: Following, start_s: float) -> None:
        self.start_s = start_s
        self.error: EngineError | None = None
        self._call, self._following, self._changed = call, following, Condition()
        self._due = [(due_s, index) for index, due_s in following.due_s.items()]
        heapify(self._due)
        self._calls: list[Future[None]] = []
        self._results: dict[int, T] = {}
        self._refused: set[int] = set()
        self._peak_delay_s, self._num_out, self._is_over = 0.0, 0, False

    def send(self, threads: ThreadPoolExecutor, limit_s: float) -> None:
        """Start each call when it is due, until those that count are finished, one has failed, or the time limit."""
        with self._changed:
            while not self._following.is_over and not self.error:
                now_s = time.perf_counter() - self.start_s
                next_s = min(self._due[0][0] if self._due else limit_s, limit_s)
                if now_s >= limit_s:
                    return
                if now_s < next_s:
                    self._changed.wait(next_s - now_s)
                elif self._num_out < MAX_IN_FLIGHT:
                    self._num_out += 1
                    self._calls.append(threads.submit(self._make, heappop(self._due)[1]))
                else:
                    self._refuse(heappop(self._due)[1])

    def end(self, abort: Callable[[], None]) -> None:
        """Abort the calls in flight, repeatedly, because a call may not have connected yet."""
        self._is_over = True
        while self._num_out:
            abort()
            time.sleep(ABORT_PERIOD_S)

    def sent(self, wall_s: float) -> Sent[T]:
        for call in self._calls:
            call.result()  # raises what is no EngineError
        arrivals_s = self._following.arrivals_s()
        results = tuple(self._results.get(index) if at is not None else None for index, at in enumerate(arrivals_s))
        refused = frozenset(index for index in self._refused if arrivals_s[index] is not None)
        return Sent(results, refused, wall_s, self._peak_delay_s, arrivals_s)

    def _make(self, index: int) -> None:
        due_s = self.start_s + self._following.due_s[index]
        with self._changed:
            self._peak_delay_s = max(self._peak_delay_s, time.perf_counter() - due_s)
        try:
            if not self._is_over:
                result = self._call(index, due_s)
                self._finish(index, result)
        except BusyError:
            with self._changed:
                self._refuse(index)
        except EngineError as error:
            self._fail(error)
        finally:
            with self._changed:
                self._following.refuse(index)  # it is not waited for, whatever the outcome
                self._num_out -= 1
                self._changed.notify()

    def _finish(self, index: int, result: T) -> None:
        with self._changed:
            self._results[index] = result
            for follower in self._following.finish(index, time.perf_counter() - self.start_s):
                heappush(self._due, (self._following.due_s[follower], follower))

    def _refuse(self, index: int) -> None:
        self._following.refuse(index)
        self._refused |= set() if self._is_over else {index}

    def _fail(self, error: EngineError) -> None:
        with self._changed:
            if not self._is_over:
                self.error = self.error or error
