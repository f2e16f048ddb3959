"""Memory in large pages, for weights.

A decode step reads all weights once. In pages of 4 KB every 64th cache line misses the translation buffer, which in a
virtual machine costs a walk through two page tables; hardware prefetchers stop at the end of a page, too.
"""

from __future__ import annotations

import logging
import mmap

import torch
from torch import Tensor

_PAGE, _CHUNK, _LINE = 2 << 20, 64 << 20, 64  # bytes: a large page, what is reserved at once, a cache line


class LargePages:
    """Tensors one after the other in large pages, where the system has them. A chunk is freed with its last tensor."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy of a contiguous tensor, aligned to cache lines."""
        source = tensor.detach().flatten().view(torch.uint8)
        size = -(-len(source) // _LINE) * _LINE
        if size > len(self._free):
            self._free = _reserve(max(size, _CHUNK))
        taken, self._free = self._free[: len(source)], self._free[size:]
        return taken.copy_(source).view(tensor.dtype).view(tensor.shape)


def _reserve(size: int) -> Tensor:
    """uint8 [size] or more, aligned to a large page. Memory is used only once it is written."""
    block = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has small pages
    try:
        block.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError) as error:  # a system without them
        logging.getLogger("specdec").info("weights are in small pages: %s", error)
    memory = torch.frombuffer(block, dtype=torch.uint8)
    return memory[-memory.data_ptr() % _PAGE :][: -(-size // _LINE) * _LINE]
