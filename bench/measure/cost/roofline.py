"""The roofline: the memory bandwidth of this machine, measured in the same run as the results compared with it.

Measured by block size, because repeatedly read data may stay in a cache, and caches may be larger than reported (in a
virtual machine). Weights read in every step are compared with a block of the same size that is read as often.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.records.schema import SCHEMA_VERSION
from specdec.models.fusion import Projection
from specdec.runtime.timing import durations_in_queue_s

SIZES = tuple(2**n for n in (22, 24, 26, 28, 29))  # bytes; the last is memory, whatever the caches
SMOKE_SIZES = SIZES[:2]  # of a run that looks whether everything works: 512 MB take seconds
Way = tuple[Callable[[], object], int]  # goes through a block once; the bytes that it reads and writes


def measure(device: torch.device, sizes: tuple[int, ...] = SIZES, repeats: int = 9) -> dict[str, Any]:
    """Measure `bandwidths` in bytes/s by block `sizes` in bytes, with the `ways` that reached them.

    No way is the fastest everywhere: a reduction may be compute-bound, and a copy also writes. The bandwidth is the
    best time of any of them, because a rate that was reached once is possible.
    """
    fastest = [_fastest(device, size, repeats) for size in sizes]
    return {
        "schema_version": SCHEMA_VERSION,
        "device": str(device),
        "sizes": list(sizes),
        "bandwidths": [bandwidth for bandwidth, _ in fastest],
        "ways": [way for _, way in fastest],
    }


def read_s(record: dict[str, Any], num_bytes: int) -> float:
    """The minimum time in seconds to read num_bytes, at the bandwidth of blocks of this size."""
    sizes, bandwidths = np.log2(record["sizes"]), record["bandwidths"]
    return num_bytes / float(np.interp(np.log2(num_bytes), sizes, bandwidths))


def line(record: dict[str, Any]) -> str:
    """A one-line summary of the measurement."""
    speeds = [f"{bandwidth / 1e9:.1f}" for bandwidth in record["bandwidths"]]
    sizes = [f"{size / 2**20:.0f}" for size in record["sizes"]]
    return (
        f"roofline: memory is read at {speeds[-1]} GB/s (blocks of {sizes[-1]} MB, {record['ways'][-1]}); "
        f"blocks of {', '.join(sizes[:-1])} MB, partly from caches, at {', '.join(speeds[:-1])} GB/s"
    )


def _fastest(device: torch.device, size: int, repeats: int) -> tuple[float, str]:
    """(bytes/s, name) of the fastest way to process a block."""
    ways = _ways(torch.ones(size // 2, dtype=torch.bfloat16, device=device))
    return max(
        (moved / min(durations_in_queue_s(run, device, repeats=repeats, warm_up=2)), name)
        for name, (run, moved) in ways.items()
    )


def _ways(block: Tensor) -> dict[str, Way]:
    """block: bfloat16 [n], n a multiple of 4096."""
    size, numbers = block.numel() * block.element_size(), block.view(torch.float32)
    copied, product = torch.empty_like(block), _product(block.view(-1, 2048))
    ways: dict[str, Way] = {
        "a sum": (numbers.sum, size),
        "a copy, reading and writing": (lambda: copied.copy_(block), 2 * size),
        "a product with one row": (product, size),
    }
    num_threads = torch.get_num_threads()
    if block.device.type == "cpu" and num_threads > 1:
        parts, threads = numbers.chunk(num_threads), ThreadPoolExecutor(num_threads)
        ways[f"sums in {num_threads} threads"] = (lambda: list(threads.map(torch.sum, parts)), size)
    return ways


def _product(weight: Tensor) -> Callable[[], object]:
    """The product of one row with a weight, as computed in decode steps on this device."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    row = weight.new_ones(1, weight.shape[1])
    project = Projection(linear) if weight.device.type == "cpu" else linear
    return torch.inference_mode()(lambda: project(row))
