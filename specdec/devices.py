"""Moving small things to where the models are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, or equally long lists of them, as a tensor on a device; does not wait for what the device is doing."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetch_later(tensor: Tensor) -> Tensor:
    """A tensor on the host, to be read once something else has waited for the device."""
    return tensor.to("cpu", non_blocking=True)
