"""Clock readings that wait for the device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def now_s(device: torch.device) -> float:
    """A clock reading in seconds, once the device has done what it was given."""
    synchronise(device)
    return time.perf_counter()


def durations_s(run: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int) -> list[float]:
    """Seconds of each of so many calls, after others that are not counted."""
    durations = []
    for _ in range(warm_up + repeats):
        start_s = now_s(device)
        run()
        durations.append(now_s(device) - start_s)
    return durations[warm_up:]
