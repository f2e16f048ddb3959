"""Moving small things to where the models are."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, or equally long lists of them, as a tensor on a device; does not wait for what the device is doing."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Where a GPU must be the current one: launches, streams, graphs and their memory are the current device's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fetch_later(tensor: Tensor) -> Tensor:
    """A tensor on the host, to be read once something else has waited for the device."""
    return tensor.to("cpu", non_blocking=True)


class Letter:
    """A place in the host's memory, pinned if a GPU writes to it, and what is on its way there."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        buffer = torch.empty(shape, dtype=torch.int64)
        self._on_gpu, self._device = device.type == "cuda", device
        self._buffer = buffer.pin_memory() if self._on_gpu else buffer
        self._arrived: Any = torch.cuda.Event() if self._on_gpu else None

    def post(self, tensor: Tensor) -> None:
        """Send a tensor, which may be overwritten by whatever the device is given next."""
        self._buffer.copy_(tensor, non_blocking=True)
        if self._on_gpu:
            self._arrived.record(torch.cuda.current_stream(self._device))

    def tolist(self) -> list[Any]:
        """What was sent, once it has arrived."""
        if self._on_gpu:
            self._arrived.synchronize()
        return self._buffer.tolist()


class Mailbox:
    """Sends int64 tensors to the host without waiting, so that the device can be given more to do meanwhile.

    Two of a shape may be under way at a time: a third takes the place of the first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._letters: dict[torch.Size, deque[Letter]] = {}

    def send(self, tensor: Tensor) -> Letter:
        """A tensor that may be overwritten by whatever the device is given next, to be read from the letter."""
        letters = self._letters.setdefault(tensor.shape, deque())
        letters.append(letters.popleft() if len(letters) == 2 else Letter(tensor.shape, self._device))
        letters[-1].post(tensor)
        return letters[-1]


def free_memories(device: str) -> dict[torch.device, int]:
    """Bytes that are free on each device that a name stands for: "cuda" is all GPUs, "cuda:1" one, "cpu" the host."""
    named = torch.device(device)
    if named.type != "cuda":
        return {named: free_host_memory()}
    indices = range(torch.cuda.device_count()) if named.index is None else (named.index,)
    return {torch.device("cuda", index): torch.cuda.mem_get_info(index)[0] for index in indices}


def free_host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of the host's memory that programs may still take, as the system estimates it; else all there is."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
