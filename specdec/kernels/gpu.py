"""Selects the Triton kernels for tensors that they support."""

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
    """Whether the Triton kernels support a tensor: on a GPU, or anywhere with TRITON_INTERPRET=1; not in float64.

    If the GPU cannot run them, torch operations are used and the reason is logged once.
    """
    if tensor.dtype == torch.float64:
        return False
    return _triton_supports(tensor.device) if tensor.device.type == "cuda" else _interprets()


def for_gpu(tensor: Tensor) -> Any:
    """The module of Triton sampling kernels if they support the tensor (see `on_gpu`), else None."""
    return importlib.import_module("specdec.kernels.triton_sampling") if on_gpu(tensor) else None


def clock(device: torch.device) -> Callable[[], Tensor] | None:
    """A function that reads the device's clock in stream order, int64 [1] in nanoseconds; CUDA graphs can capture it.

    None for a GPU that cannot run Triton kernels.
    """
    if device.type == "cpu":
        return lambda: torch.full((1,), time.perf_counter_ns())
    if device.type != "cuda" or not _triton_supports(device):
        return None
    return partial(importlib.import_module("specdec.kernels.triton_clock").now_ns, device)


@cache
def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_supports(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        fall_back(_UNUSED_ON_GPU, f"its compute capability of {major}.{minor} must be at least 8.0")
        return False
    if importlib.util.find_spec("triton") is None:
        fall_back(_UNUSED_ON_GPU, "Triton is missing (it comes with torch for CUDA on Linux; else: pip install triton)")
        return False
    return True
