"""Small transfers between host and device."""

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
    """Numbers, or lists of equal length, as a tensor on a device, without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def upload_into(fixed: Tensor, values: Sequence[Any]) -> None:
    """`upload` to where a tensor of the same shape is, without waiting for the device."""
    tensor = torch.tensor(values, dtype=fixed.dtype)
    fixed.copy_(tensor.pin_memory() if fixed.is_cuda else tensor, non_blocking=True)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current device, which launches, streams, graphs and their memory refer to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def fetch_later(tensor: Tensor) -> Tensor:
    """Start copying a tensor to the host; read it only after something has waited for the device."""
    return tensor.to("cpu", non_blocking=True)


class Letter:
    """A host buffer, pinned for GPUs, and the transfer into it."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        buffer = torch.empty(shape, dtype=torch.int64)
        self._on_gpu, self._device = device.type == "cuda", device
        self._buffer = buffer.pin_memory() if self._on_gpu else buffer
        self._arrived: Any = torch.cuda.Event() if self._on_gpu else None

    def post(self, tensor: Tensor) -> None:
        """Start the transfer of a tensor, which later work on the device may overwrite."""
        self._buffer.copy_(tensor, non_blocking=True)
        if self._on_gpu:
            self._arrived.record(torch.cuda.current_stream(self._device))

    def tolist(self) -> list[Any]:
        """Wait for the transfer and return its content."""
        if self._on_gpu:
            self._arrived.synchronize()
        return self._buffer.tolist()


class Mailbox:
    """Sends int64 tensors to the host asynchronously, so that more work can be queued meanwhile.

    Two transfers of a shape may be in flight; a third reuses the buffer of the first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._letters: dict[torch.Size, deque[Letter]] = {}

    def send(self, tensor: Tensor) -> Letter:
        """Start the transfer of a tensor; read it from the returned letter."""
        letters = self._letters.setdefault(tensor.shape, deque())
        letters.append(letters.popleft() if len(letters) == 2 else Letter(tensor.shape, self._device))
        letters[-1].post(tensor)
        return letters[-1]


def free_memories(device: str) -> dict[torch.device, int]:
    """Free bytes on each device that a name refers to: "cuda" is all GPUs, "cuda:1" one, "cpu" the host."""
    named = torch.device(device)
    if named.type != "cuda":
        return {named: free_host_memory()}
    indices = range(torch.cuda.device_count()) if named.index is None else (named.index,)
    return {torch.device("cuda", index): torch.cuda.mem_get_info(index)[0] for index in indices}


def free_host_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """The host's available memory in bytes as estimated by the system; without an estimate, its total memory."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
