"""Which tensors the Triton kernels take."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from specdec.runtime.fallbacks import fall_back

_UNUSED_ON_GPU = "kernels for this GPU are not used, decoding is slower"


def on_gpu(tensor: Tensor) -> bool:
    """Whether the Triton kernels take a tensor: on a GPU, and with TRITON_INTERPRET=1 anywhere; not in float64.

    Where a GPU cannot run them torch's operations are used, and the reason is logged once.
    """
    if tensor.dtype == torch.float64:
        return False
    return _triton_takes(tensor.device) if tensor.device.type == "cuda" else _interprets()


def for_gpu(tensor: Tensor) -> Any:
    """The sampling kernels in Triton where they take a tensor, see `on_gpu`, else None."""
    return importlib.import_module("specdec.kernels.triton_sampling") if on_gpu(tensor) else None


def clock(device: torch.device) -> Callable[[], Tensor] | None:
    """What reads a device's clock when its queue comes to it, in a recording too: int64 [1], nanoseconds.

    None for a GPU that does not run Triton kernels.
    """
    if device.type == "cpu":
        return lambda: torch.full((1,), time.perf_counter_ns())
    if device.type != "cuda" or not _triton_takes(device):
        return None
    return partial(importlib.import_module("specdec.kernels.triton_clock").now_ns, device)


@cache
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_takes(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        fall_back(_UNUSED_ON_GPU, f"its compute capability of {major}.{minor} must be at least 8.0")
        return False
    if importlib.util.find_spec("triton") is None:
        fall_back(_UNUSED_ON_GPU, "Triton is missing (it comes with torch for CUDA on Linux; else: pip install triton)")
        return False
    return True
