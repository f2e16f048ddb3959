"""The GPU's clock as a Triton kernel, to time the phases within a CUDA graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer


@triton.jit
def _clock_kernel(out):
    tl.store(out, globaltimer())


def now_ns(device: torch.device) -> Tensor:
    """The GPU's clock after all work queued before, in nanoseconds, int64 [1]; its resolution is 32 to 1024 ns.

    Launched without overlap: it starts after the previous kernel has ended, and the next kernel starts after it.
    """
    out = torch.empty(1, dtype=torch.int64, device=device)
    _clock_kernel[(1,)](out, num_warps=1)
    return out
