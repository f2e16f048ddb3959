"""The ragged static KV cache: one preallocated block per layer, a length per slot.

The keys and values of a token are stored at the column of its position. Entries beyond a slot's length are stale and
never attended to, because a query attends only to positions up to its own. So rollback only sets a length, and any
transformers causal model works unchanged with per-row position ids, a 4-D mask and this cache.

Layers with a sliding window or chunks have a ring of fewer columns, see `specdec.models.state.windows`: a block with R
columns, fewer than the capacity, stores place p in column p mod R.

The nodes of a token tree are stored in consecutive places, whatever their positions, and attend only to their
ancestors. The accepted path is then moved to the places of its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.kernels import cpp
from specdec.models.base import FeatureLayers
from specdec.models.state.windows import LocalAttention
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches, offsets, visible

_MIN_EXTENT = 256
_UNLIMITED = 1 << 30


@dataclass(slots=True)
class _Window:
    """Where the current forward call writes and what it attends to.

    slots: the rows' slots. positions: int64 [rows, width]. extent: number of places attended to, including the last one
    written. start: the first place if it is the same in all rows, which allows a plain copy.
    places: int64 [rows, width], the places written: the positions, except for trees. They are the columns of blocks
    that are no rings.
    starts: int64 [rows], valid tokens per slot. branches: for a tree, else None.
    masks, columns: those already computed for this call, by kind of attention and by number of columns.
    """

    slots: slice
    positions: Tensor
    extent: int
    start: int | None
    places: Tensor
    starts: Tensor
    branches: Branches | None = None
    masks: dict[tuple[LocalAttention | None, torch.dtype], Tensor] = field(default_factory=dict)
    columns: dict[int, Tensor] = field(default_factory=dict)


class RaggedCache(Cache):  # type: ignore[misc]  # transformers has no complete types
    """Keys and values [slots, heads, columns, head_dim] for each layer, allocated on first use.

    local: by layer, its sliding window or chunks, or None where all positions are attended to; empty for no local
    layers. columns: the capacity, or for a local layer those of its ring.
    num_cached: valid tokens per slot, updated by the caller. features: hidden states of `feature_layers`, concatenated,
    that the model stores with them, float [slots, capacity, width], or None.

    Raises ValueError if a call would exceed the capacity, if it is wider than a ring allows, and if a rollback needs
    tokens that a ring no longer holds.
    """

    def __init__(
        self, num_layers: int, num_slots: int, capacity: int, local: Sequence[LocalAttention | None] = ()
    ) -> None:
        self.num_slots, self.capacity = num_slots, capacity
        self.num_cached = [0] * num_slots
        # within its size, local attention is full attention
        within = [each if each and each.size < capacity else None for each in local]
        self.local = tuple(within) or (None,) * num_layers
        self._rings = {each for each in within if each and each.num_columns(capacity) < capacity}
        self._num_written = [0] * num_slots  # one more than the last place written since the slot was emptied
        self.features: Tensor | None = None
        self.feature_layers: FeatureLayers = ()
        self._feature_blocks: Sequence[Tensor] = ()  # views of the features, one per layer
        super().__init__(layers=[_RaggedLayer(self, self.num_columns(index)) for index in range(num_layers)])

    def num_columns(self, index: int) -> int:
        """Columns of a layer's block."""
        local = self.local[index]
        return self.capacity if local is None else local.num_columns(self.capacity)

    @property
    def max_width(self) -> int:
        """The most tokens per row of one call; without rings there is no limit."""
        return min((each.num_spare + 1 for each in self._rings), default=_UNLIMITED)

    def holds(self, slot: int, num_tokens: int) -> bool:
        """Whether a slot can be rolled back to its first num_tokens tokens."""
        return all(each.reaches(num_tokens, self._num_written[slot], self.capacity) for each in self._rings)

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
        if self._rings:
            self._mark(first_slot, lengths, first + width)
        return self._open(first_slot, upload(lengths, device), width, extent, start, branches)

    def open_at(
        self, first_slot: int, starts: Tensor, width: int, extent: int, branches: Branches | None = None
    ) -> Tensor:
        """`open` without host involvement: rows begin at starts, int64 [rows], and attend to `extent` places.

        extent: at least the length of every row after the call, from `reserve`; padding beyond it is written at the
        end.
        """
        return self._open(first_slot, starts, width, extent, None, branches)

    def reserve(self, first_slot: int, starts: Sequence[int], width: int) -> int:
        """Announce calls of `open_at` that write up to `width` tokens from starts[r] on; returns their extent.

        Raises ValueError if a slot cannot be rolled back to its start.
        """
        if self._rings:
            self._mark(first_slot, starts, width)
        return self.extent_for(max(starts) + width)

    def _mark(self, first_slot: int, starts: Sequence[int], width: int) -> None:
        """Record how far each row is written, after checking that it can start there."""
        for slot, start in enumerate(starts, first_slot):
            if not self.holds(slot, start):
                raise ValueError(
                    f"num_cached={start} of slot {slot} must be at least {self._num_written[slot] - self.max_width}: "
                    f"{self._num_written[slot]} tokens were written, and a layer with a sliding window no longer holds "
                    "older ones; set it to 0 and prefill again"
                )
        for slot, start in enumerate(starts, first_slot):
            self._num_written[slot] = max(self._num_written[slot], start + width) if start else width

    def _open(
        self, first_slot: int, starts: Tensor, width: int, extent: int, start: int | None, branches: Branches | None
    ) -> Tensor:
        slots, first = slice(first_slot, first_slot + len(starts)), branches.first if branches else 0
        if self._rings and first + width > self.max_width:
            raise ValueError(
                f"width={first + width} must be at most {self.max_width} tokens in one call, as a layer has a sliding "
                "window; feed fewer at once"
            )
        places = starts.unsqueeze(1) + torch.arange(first, first + width, device=starts.device)
        places = places.clamp(max=self.capacity - 1) if start is None else places
        positions = starts.unsqueeze(1) + offsets(branches, starts.device) if branches else places
        self.window = _Window(slots, positions, extent, start, places, starts, branches)
        return positions

    def seen_positions(self) -> Tensor:
        """The position of each place in the open window's extent, int64 [rows or 1, 1, extent]."""
        places = torch.arange(self.window.extent, device=self.window.positions.device)
        return self._positions(places.unsqueeze(0)).unsqueeze(1)

    def _positions(self, places: Tensor) -> Tensor:
        """The positions of the tokens at places, int64 [rows or 1, n] each: the same, except for tree nodes."""
        window = self.window
        if window.branches is None:
            return places
        depths, starts = offsets(replace(window.branches, first=0), places.device), window.starts.unsqueeze(1)
        columns = places - starts
        of_nodes = starts + depths[columns.clamp(0, len(depths) - 1)]
        return torch.where(columns < 0, places, of_nodes)

    def keep(self, starts: Tensor, path: Tensor) -> None:
        """Keep the accepted path of a tree: move each row's entry at place starts[r] + path[r, i] to starts[r] + i.

        starts: int64 [rows], for the first slots. path: int64 [rows, n], ascending with path[r, i] >= i.
        """
        blocks = [block for layer in self.layers if layer.is_initialized for block in (layer.keys, layer.values)]
        if len({(block.shape, block.dtype) for block in blocks}) == 1 and not self._rings and cpp.supports(blocks[0]):
            cpp.keep(blocks, starts, path)
        else:
            for block in blocks:
                self._keep(block, starts, path)
        if self.features is not None:
            self._keep(self.features.unsqueeze(1), starts, path)

    def _keep(self, block: Tensor, starts: Tensor, path: Tensor) -> None:
        """`keep` for one block [slots, heads, columns, dim]."""
        starts, path, last = starts.to(block.device).unsqueeze(1), path.to(block.device), self.capacity - 1
        row = torch.arange(len(path), device=block.device).unsqueeze(1)
        to = (starts + torch.arange(path.shape[1], device=block.device)).clamp(max=last)
        entries = block[row, :, (starts + path).clamp(max=last).remainder(block.shape[2])]
        block[row, :, to.remainder(block.shape[2])] = entries

    def extent_for(self, length: int) -> int:
        """An upper bound on this length, rounded so that few shapes occur."""
        return min(max(_MIN_EXTENT, 1 << (length - 1).bit_length()), self.capacity)

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        """Copy the first num_tokens of a slot to another, or truncate a slot.

        Raises ValueError if a ring no longer holds them, see `holds`.
        """
        if not self.holds(source, num_tokens):
            raise ValueError(
                f"num_tokens={num_tokens} of slot {source} cannot be copied: {self._num_written[source]} were written, "
                "and a layer with a sliding window no longer holds older ones; prefill again"
            )
        blocks = [block for layer in self.layers if layer.is_initialized for block in (layer.keys, layer.values)]
        for block in blocks:
            columns = slice(num_tokens if block.shape[2] == self.capacity else None)
            block[slot, :, columns] = block[source, :, columns]
        if self.features is not None:
            self.features[slot, :num_tokens] = self.features[source, :num_tokens]
        self.num_cached[slot], self._num_written[slot] = num_tokens, self._num_written[source]

    def write(self, block: Tensor, states: Tensor) -> Tensor:
        """Write states [rows, heads, width, dim] to the open window of a block [slots, heads, columns, dim].

        Returns the columns in use: [rows, heads, min(extent, columns), dim].
        """
        window, rows, size = self.window, block[self.window.slots], block.shape[2]
        start = None if window.start is None else window.start % size
        if start is not None and start + states.shape[2] <= size:
            rows[:, :, start : start + states.shape[2]] = states
        else:
            columns = self._columns(size).to(block.device)
            row = torch.arange(len(columns), device=block.device).unsqueeze(1)
            rows[row, :, columns] = states.transpose(1, 2)  # scatter_ would first copy the whole block
        return rows[:, :, : window.extent]

    def _columns(self, size: int) -> Tensor:
        """The columns written in blocks of `size` columns: int64 [rows, width]."""
        window = self.window
        if size not in window.columns:
            window.columns[size] = window.places if size == self.capacity else window.places.remainder(size)
        return window.columns[size]

    def blocks(self, index: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [rows, heads, columns, head_dim] each, of the open window's rows."""
        layer: _RaggedLayer = self.layers[index]
        if not layer.is_initialized:
            states = torch.empty(0, num_heads, 0, head_dim, dtype=dtype, device=self.window.positions.device)
            layer.lazy_initialization(states, states)
        return layer.keys[self.window.slots], layer.values[self.window.slots]

    def mask(self, dtype: torch.dtype, local: LocalAttention | None = None) -> Tensor:
        """Additive attention mask of the open window: 0 where attended, else the minimum.

        [rows, 1, width, columns in use], for the blocks of layers with this local attention, or None for full
        attention. A token attends to tokens up to its own; a tree node to those before the tree, its ancestors and
        itself.
        """
        masks = self.window.masks
        if (local, dtype) not in masks:
            hidden = self._hidden() if local is None else self._hidden_by(local)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            masks[local, dtype] = mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)
        return masks[local, dtype]

    def _hidden(self) -> Tensor:
        """What full attention does not attend to: bool [rows, width, extent]."""
        return self._hidden_at(torch.arange(self.window.extent, device=self.window.positions.device).unsqueeze(0))

    def _hidden_by(self, local: LocalAttention) -> Tensor:
        """What local attention does not attend to: bool [rows, width, min(extent, columns)]."""
        window, size = self.window, local.num_columns(self.capacity)
        first = window.branches.first if window.branches else 0
        ends = (window.starts + first + window.places.shape[1]).clamp(max=self.capacity)
        places = local.places(ends, self.capacity, min(window.extent, size))
        is_outside = local.hides(window.positions.unsqueeze(-1), self._positions(places).unsqueeze(1))
        return self._hidden_at(places) | is_outside | (places < 0).unsqueeze(1)

    def _hidden_at(self, places: Tensor) -> Tensor:
        """Which of the tokens at places, int64 [rows or 1, n], come after a query or on other branches of its tree.

        bool [rows, width, n].
        """
        window = self.window
        if window.branches is None:
            return places.unsqueeze(1) > window.positions.unsqueeze(-1)
        # one column for the valid tokens, the tree's columns, and one for those after them
        seen = torch.nn.functional.pad(visible(window.branches, places.device).float(), (1, 0), value=1.0)
        seen = torch.nn.functional.pad(seen, (0, 1)) > 0
        columns = (places - window.starts.unsqueeze(1) + 1).clamp(0, seen.shape[1] - 1)
        return ~seen[:, columns].transpose(0, 1)


class _RaggedLayer(CacheLayerMixin):  # type: ignore[misc]  # see above
    """One layer's block; the interface is transformers'."""

    is_sliding = False

    def __init__(self, cache: RaggedCache, num_columns: int) -> None:
        super().__init__()
        self.cache, self.num_columns = cache, num_columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def block(states: Tensor) -> Tensor:  # zeros: a masked NaN would still poison the sum over values
            shape = (self.cache.num_slots, states.shape[1], self.num_columns, states.shape[3])
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
        return min(self.cache.window.extent, self.num_columns), 0

    def get_seq_length(self) -> int:
        return self.cache.window.extent - self.cache.window.positions.shape[1]

    def get_max_length(self) -> int:
        return self.cache.capacity
