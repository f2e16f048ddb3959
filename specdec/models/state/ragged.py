"""The ragged static KV cache: one preallocated block per layer, a length per slot.

The keys and values of a token are stored at the column of its position. Entries beyond a slot's length are stale and
never attended to, because a query attends only to positions up to its own. So rollback only sets a length, and any
transformers causal model works unchanged with per-row position ids, a 4-D mask and this cache.

The nodes of a token tree are stored in consecutive columns, whatever their positions, and attend only to their
ancestors. The accepted path is then moved to the columns of its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.kernels import cpp
from specdec.models.base import FeatureLayers
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches, offsets, visible

_MIN_EXTENT = 256


@dataclass(slots=True)
class _Window:
    """Where the current forward call writes and what it attends to.

    slots: the rows' slots. positions: int64 [rows, width]. extent: number of cache columns attended to, including the
    last one written. start: the first column if it is the same in all rows, which allows a plain copy.
    places: int64 [rows, width], the columns written: the positions, except for trees.
    starts: int64 [rows], valid tokens per slot. branches: for a tree, else None.
    """

    slots: slice
    positions: Tensor
    extent: int
    start: int | None
    places: Tensor
    starts: Tensor
    branches: Branches | None = None


class RaggedCache(Cache):  # type: ignore[misc]  # transformers has no complete types
    """Keys and values [slots, heads, capacity, head_dim] for each layer, allocated on first use.

    num_cached: valid tokens per slot, updated by the caller. features: hidden states of `feature_layers`, concatenated,
    that the model stores with them, float [slots, capacity, width], or None. Raises ValueError if a call would exceed
    the capacity.
    """

    def __init__(self, num_layers: int, num_slots: int, capacity: int) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.num_cached = [0] * num_slots
        self.features: Tensor | None = None
        self.feature_layers: FeatureLayers = ()
        self._feature_blocks: Sequence[Tensor] = ()  # views of the features, one per layer
        super().__init__(layers=[_RaggedLayer(self) for _ in range(num_layers)])

    def add_features(
        self, layers: FeatureLayers, widths: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate `features` for the hidden states of these layers, each of its own width."""
        self.feature_layers = layers
        self.features = torch.zeros(self.num_slots, self.capacity, sum(widths), dtype=dtype, device=device)
        self._feature_blocks = self.features.split(list(widths), -1)

    def write_features(self, states: Tensor, index: int | None = None) -> None:
        """Store hidden states [rows, width, n] of layer feature_layers[index] for the tokens of the open window.

        index: None for the states of all layers, concatenated.
        """
        block = self.features if index is None else self._feature_blocks[index]
        assert block is not None, "features were added"
        self.write(block.unsqueeze(1), states.to(block).unsqueeze(1))

    def open(
        self, first_slot: int, rows: int, width: int, device: torch.device, branches: Branches | None = None
    ) -> Tensor:
        """Prepare to append `width` tokens to each of `rows` slots; returns their positions, int64 [rows, width].

        branches: for the nodes of a tree, with the same `width`.
        """
        lengths, first = self.num_cached[first_slot : first_slot + rows], branches.first if branches else 0
        extent = max(lengths) + first + width
        if extent > self.capacity:
            raise ValueError(
                f"{max(lengths)} cached tokens and {first + width} more exceed the cache's capacity of "
                f"{self.capacity}; allocate a larger one"
            )
        start = lengths[0] + first if len(set(lengths)) == 1 else None
        return self._open(first_slot, upload(lengths, device), width, extent, start, branches)

    def open_at(
        self, first_slot: int, starts: Tensor, width: int, extent: int, branches: Branches | None = None
    ) -> Tensor:
        """`open` without host involvement: rows begin at starts, int64 [rows], and attend to `extent` columns.

        extent: at least the length of every row after the call; padding beyond it is written at the end.
        """
        return self._open(first_slot, starts, width, extent, None, branches)

    def _open(
        self, first_slot: int, starts: Tensor, width: int, extent: int, start: int | None, branches: Branches | None
    ) -> Tensor:
        slots, first = slice(first_slot, first_slot + len(starts)), branches.first if branches else 0
        places = starts.unsqueeze(1) + torch.arange(first, first + width, device=starts.device)
        places = places.clamp(max=self.capacity - 1) if start is None else places
        positions = starts.unsqueeze(1) + offsets(branches, starts.device) if branches else places
        self.window = _Window(slots, positions, extent, start, places, starts, branches)
        return positions

    def seen_positions(self) -> Tensor:
        """The position of each cache column in the open window's extent, int64 [rows or 1, 1, extent]."""
        window = self.window
        places = torch.arange(window.extent, device=window.positions.device)
        if window.branches is None:
            return places.view(1, 1, -1)
        depths, starts = offsets(replace(window.branches, first=0), places.device), window.starts.unsqueeze(1)
        columns = places - starts
        of_nodes = starts + depths[columns.clamp(0, len(depths) - 1)]
        return torch.where(columns < 0, places, of_nodes).unsqueeze(1)

    def keep(self, starts: Tensor, path: Tensor) -> None:
        """Keep the accepted path of a tree: move each row's entry at starts[r] + path[r, i] to starts[r] + i.

        starts: int64 [rows], for the first slots. path: int64 [rows, n], ascending with path[r, i] >= i.
        """
        blocks = [block for layer in self.layers if layer.is_initialized for block in (layer.keys, layer.values)]
        if len({(block.shape, block.dtype) for block in blocks}) == 1 and cpp.supports(blocks[0]):
            cpp.keep(blocks, starts, path)
        else:
            for block in blocks:
                _keep(block, starts, path)
        if self.features is not None:
            _keep(self.features.unsqueeze(1), starts, path)

    def extent_for(self, length: int) -> int:
        """An upper bound on this length, rounded so that few shapes occur."""
        return min(max(_MIN_EXTENT, 1 << (length - 1).bit_length()), self.capacity)

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        """Copy the first num_tokens of a slot to another, or truncate a slot."""
        blocks = [block for layer in self.layers if layer.is_initialized for block in (layer.keys, layer.values)]
        for block in blocks:
            block[slot, :, :num_tokens] = block[source, :, :num_tokens]
        if self.features is not None:
            self.features[slot, :num_tokens] = self.features[source, :num_tokens]
        self.num_cached[slot] = num_tokens

    def write(self, block: Tensor, states: Tensor) -> Tensor:
        """Write states [rows, heads, width, dim] to the open window of a block [slots, heads, capacity, dim].

        Returns the columns within the extent: [rows, heads, extent, dim].
        """
        window, rows = self.window, block[self.window.slots]
        if window.start is not None:
            rows[:, :, window.start : window.extent] = states
        else:
            places = window.places.to(block.device)
            row = torch.arange(len(places), device=block.device).unsqueeze(1)
            rows[row, :, places] = states.transpose(1, 2)  # scatter_ would first copy the whole block
        return rows[:, :, : window.extent]

    def blocks(self, index: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [rows, heads, capacity, head_dim] each, of the open window's rows."""
        layer: _RaggedLayer = self.layers[index]
        if not layer.is_initialized:
            states = torch.empty(0, num_heads, 0, head_dim, dtype=dtype, device=self.window.positions.device)
            layer.lazy_initialization(states, states)
        return layer.keys[self.window.slots], layer.values[self.window.slots]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive attention mask [rows, 1, width, extent] of the open window: 0 where attended, else the minimum.

        A token attends to columns up to its own; a tree node to those before the tree, its ancestors and itself.
        """
        window = self.window
        places = torch.arange(window.extent, device=window.positions.device)
        if window.branches is None:
            hidden = places > window.positions.unsqueeze(-1)
        else:  # one column for the valid tokens, the tree's columns, and one for those after them
            seen = torch.nn.functional.pad(visible(window.branches, places.device).float(), (1, 0), value=1.0)
            seen = torch.nn.functional.pad(seen, (0, 1)) > 0
            columns = (places - window.starts.unsqueeze(1) + 1).clamp(0, seen.shape[1] - 1)
            hidden = ~seen[:, columns].transpose(0, 1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=places.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)


def _keep(block: Tensor, starts: Tensor, path: Tensor) -> None:
    """`RaggedCache.keep` for one block [slots, heads, capacity, dim]."""
    starts, path = starts.to(block.device).unsqueeze(1), path.to(block.device)
    row = torch.arange(len(path), device=block.device).unsqueeze(1)
    to = (starts + torch.arange(path.shape[1], device=block.device)).clamp(max=block.shape[2] - 1)
    block[row, :, to] = block[row, :, (starts + path).clamp(max=block.shape[2] - 1)]


class _RaggedLayer(CacheLayerMixin):  # type: ignore[misc]  # see above
    """One layer's block; the interface is transformers'."""

    is_sliding = False

    def __init__(self, cache: RaggedCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def block(states: Tensor) -> Tensor:  # zeros: a masked NaN would still poison the sum over values
            shape = (self.cache.num_slots, states.shape[1], self.cache.capacity, states.shape[3])
            return torch.zeros(shape, dtype=states.dtype, device=states.device)

        self.keys, self.values = block(key_states), block(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self.cache.write(self.keys, key_states), self.cache.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window.extent, 0

    def get_seq_length(self) -> int:
        return self.cache.window.extent - self.cache.window.positions.shape[1]

    def get_max_length(self) -> int:
        return self.cache.capacity
