"""Fused layers run in one call of the kernels of their device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, pointer
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from specdec.kernels import cpp
from specdec.models.fusion.layers import FusedLayer
from specdec.models.fusion.rotary import Angles, Rotary
from specdec.models.state.ragged import RaggedCache
from specdec.trees.columns import tree_paths


def stack_of(layers: Sequence[FusedLayer], rotary: Any) -> Stack | GpuStack:
    """The fused layers, all with a kernel, as one call of the kernels of their device."""
    return Stack(layers, rotary) if isinstance(layers[0].kernel, cpp.Layer) else GpuStack(layers, rotary)


class GpuStack:
    """Consecutive fused layers of the same shape, run by `specdec.kernels.triton_layers`.

    rotary: the transformers rotary embedding.
    """

    def __init__(self, layers: Sequence[FusedLayer], rotary: Any) -> None:
        from specdec.kernels import triton_layers

        self._run, self._max_width = triton_layers.run_layers, triton_layers.MAX_WIDTH
        self._places, self._cached = triton_layers.Places, triton_layers.Cached
        self._layers, self._rotary = layers, Rotary(rotary, layers)
        self._kernels: list[Any] = [layer.kernel for layer in layers]
        self._angles: dict[int, list[Angles]] = {}  # kept alive: captured graphs read them at their addresses

    def supports(self, width: int) -> bool:
        """Whether the kernels can process `width` tokens per row."""
        return width <= self._max_width and not self._rotary.depends_on_length

    def __call__(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Run all layers on hidden states [rows, width, hidden] in the open window of the cache."""
        return self.states(hidden, cache, [len(self._layers)])[0]

    def states(self, hidden: Tensor, cache: RaggedCache, after: Sequence[int]) -> list[Tensor]:
        """The same, with the hidden states after the first n layers for each n of `after`, ascending."""
        window, first = cache.window, self._layers[0]
        shape = (first.num_kv_heads, first.head_dim, hidden.dtype)
        blocks = [
            self._cached(*cache.blocks(layer.index, *shape), _window(cache, layer.index)) for layer in self._layers
        ]
        tree = None if window.branches is None else tree_paths(window.branches, hidden.device)
        at = self._places(
            window.positions.contiguous(), window.places.contiguous(), window.starts.contiguous(), tree, window.extent
        )
        return self._run(self._kernels, hidden, self._angles_up_to(cache.capacity, hidden), blocks, at, after)

    def _angles_up_to(self, capacity: int, hidden: Tensor) -> list[Angles]:
        """Tables of cos and sin [capacity, head_dim] for each layer."""
        if capacity not in self._angles:
            self._angles[capacity] = _tables(self._rotary, hidden, capacity)
        return self._angles[capacity]


def _window(cache: RaggedCache, index: int) -> int | None:
    """The sliding window of a layer; None for full attention."""
    local = cache.local[index]
    assert local is None or not local.is_chunked, "no architecture of `anatomy` has chunks"
    return None if local is None else local.size


def _tables(rotary: Rotary, hidden: Tensor, num_positions: int) -> list[Angles]:
    """Tables of cos and sin [num_positions, head_dim] for each layer; layers of the same kind share them."""
    angles = rotary.angles(hidden, torch.arange(num_positions, device=hidden.device).unsqueeze(0))
    tables = {id(cos): (cos[0].contiguous(), sin[0].contiguous()) for cos, sin in angles}
    return [tables[id(cos)] for cos, _ in angles]


class Stack:
    """Consecutive fused layers of the same shape, run by `specdec.kernels.cpp`.

    rotary: the transformers rotary embedding.
    """

    def __init__(self, layers: Sequence[FusedLayer], rotary: Any) -> None:
        self._indices, self._rotary = [layer.index for layer in layers], Rotary(rotary, layers)
        self._angles: cpp.Angles | None = None  # of all positions: recomputing them takes a dozen operations
        self._cache: Callable[[], RaggedCache | None] = lambda: None  # the cache that `_cached_blocks` point into
        self._cached_blocks: cpp.Blocks | None = None
        self._kernels = [layer.kernel for layer in layers if layer.kernel]
        self._pointers = (POINTER(cpp.Layer) * len(self._kernels))(*(pointer(kernel) for kernel in self._kernels))
        self._num_kv_heads, self._head_dim = layers[0].num_kv_heads, layers[0].head_dim

    def supports(self, width: int) -> bool:
        """Whether the kernels can process `width` tokens per row."""
        return True

    def __call__(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Run all layers on hidden states [rows, width, hidden] in the open window of the cache."""
        return self.states(hidden, cache, [len(self._kernels)])[0]

    def both_ways(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """The same, but each token attends to all tokens of the window, not only to those before it."""
        window, width = cache.window, hidden.shape[1]
        seen = window.positions[:, -1:].expand_as(window.positions)
        everything = torch.arange(width).expand(width, width)  # to the kernels, a tree whose paths hold all columns
        tree = cpp.TreePlaces(window.places, window.starts, everything)
        return self._run(hidden, cache, seen, tree, [len(self._kernels)])[0]

    def states(
        self, hidden: Tensor, cache: RaggedCache, after: Sequence[int], inputs: Tensor | None = None
    ) -> list[Tensor]:
        """The same, with the hidden states after the first n layers for each n of `after`, ascending.

        inputs: what the first layer's attention reads, see `cpp.run_layers`.
        """
        window, tree = cache.window, None
        if window.branches is not None:
            tree = cpp.TreePlaces(window.places, window.starts, tree_paths(window.branches, hidden.device))
        return self._run(hidden, cache, window.positions, tree, after, inputs)

    def _run(
        self,
        hidden: Tensor,
        cache: RaggedCache,
        seen: Tensor,
        tree: cpp.TreePlaces | None,
        after: Sequence[int],
        inputs: Tensor | None = None,
    ) -> list[Tensor]:
        """seen: int64 [rows, width], the last position that each token attends to."""
        angles, index = self._angles_of(hidden, cache)
        blocks = self._blocks(cache, hidden.dtype)
        return cpp.run_layers(self._pointers, hidden, angles, index, seen, blocks, tree, after, inputs)

    def _angles_of(self, hidden: Tensor, cache: RaggedCache) -> tuple[cpp.Angles, Tensor]:
        """Each layer's tables of cos and sin [n, head_dim] and each token's index into them, int64 [rows, width]."""
        positions = cache.window.positions
        if self._rotary.depends_on_length:
            angles = [
                (cos.expand(*positions.shape, -1).flatten(0, 1), sin.expand(*positions.shape, -1).flatten(0, 1))
                for cos, sin in self._rotary.angles(hidden, positions)
            ]
            return cpp.Angles.of(angles), torch.arange(positions.numel(), device=hidden.device)
        if self._angles is None or self._angles.length < cache.window.extent or self._angles.dtype != hidden.dtype:
            self._angles = cpp.Angles.of(_tables(self._rotary, hidden, max(2 * cache.window.extent, 512)))
        return self._angles, positions

    def _blocks(self, cache: RaggedCache, dtype: torch.dtype) -> cpp.Blocks:
        """The open window's rows of the cache; for decode steps, which start at the first slot, looked up only once."""
        if self._cached_blocks and self._cache() is cache and cache.window.slots.start == 0:
            return self._cached_blocks
        arrays = [cache.blocks(index, self._num_kv_heads, self._head_dim, dtype) for index in self._indices]
        blocks = cpp.Blocks.of(arrays, [_window(cache, index) for index in self._indices])
        if cache.window.slots.start == 0:
            self._cache, self._cached_blocks = ref(cache), blocks
        return blocks
