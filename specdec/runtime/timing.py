"""Timing with device synchronization."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now_s(device: torch.device) -> float:
    """A clock reading in seconds after the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


def sleep_until(moment_s: float) -> None:
    """Sleep until a clock reading in seconds; returns at once if it has passed."""
    time.sleep(max(0.0, moment_s - time.perf_counter()))


def durations_s(run: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int) -> list[float]:
    """Seconds of each of `repeats` calls, after `warm_up` calls that are not counted."""
    durations = []
    for _ in range(warm_up + repeats):
        start_s = now_s(device)
        run()
        durations.append(now_s(device) - start_s)
    return durations[warm_up:]


def durations_in_queue_s(
    run: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int, calls: int = 20
) -> list[float]:
    """Like `durations_s`, but on a GPU each is the mean of `calls` calls between two events on its stream.

    The GPU then does not wait for the host between calls, provided that launching one is faster than running it.
    """
    if device.type != "cuda":
        return durations_s(run, device, repeats=repeats, warm_up=warm_up)
    durations = []
    with torch.cuda.device(device):
        for _ in range(warm_up + repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            durations.append(start.elapsed_time(end) / 1e3 / calls)
    return durations[warm_up:]


class Stopwatch:
    """Accumulates seconds by name. On a GPU it records events, so nothing waits until the totals are read."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._device = device.type == "cuda", device
        self._seconds: dict[str, float] = defaultdict(float)
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time the work done, or queued on the GPU, inside."""
        start = self._mark()
        yield
        self._marks.append((name, start, self._mark()))
        if not self._on_gpu or len(self._marks) > 10_000:
            self._collect()

    def add(self, name: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self._seconds[name] += seconds

    def seconds(self) -> dict[str, float]:
        """Total seconds by name."""
        if self._marks:
            self._collect()
        return dict(self._seconds)

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _collect(self) -> None:
        synchronize(self._device)
        for name, start, end in self._marks:
            self._seconds[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        self._marks.clear()
