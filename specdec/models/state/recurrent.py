"""Recurrent and convolution states, rolled back by position.

A recurrent layer (a gated delta net, Mamba, a short convolution) keeps one state per sequence instead of keys and
values per token, so it cannot be cut back to a length. Here it keeps the states after each of a slot's last tokens, in
a ring of `depth` places: the state after n tokens is at place n % depth. A call that continues after n tokens starts
from that state, so a rollback only sets a length, as for attention. After 0 tokens the state is zero.

A step that verifies k drafted tokens is rolled back by at most k tokens, so k + 1 states per slot suffice, and are all
the memory that a layer takes. A prompt is read at once and leaves only the state after its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer

from specdec.models.state.ragged import RaggedCache, _RaggedLayer
from specdec.models.state.windows import LocalAttention
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches

Key = tuple[str, int]
"""A state of a layer as transformers names it: "conv" or "recurrent", and its index among those of the layer."""


class StateRing:
    """One state of a layer, after each of the last `depth` tokens of each slot.

    block: [slots, depth, ...], allocated by the first write, which knows the shape.
    """

    def __init__(self, num_slots: int, depth: int) -> None:
        self.depth = depth
        self.block: Tensor | None = None
        self._held = [[-1] * depth for _ in range(num_slots)]  # the length after which each place's state is, or -1

    def lengths(self, slot: int) -> list[int]:
        """The lengths, other than 0, after which the slot can be continued, ascending."""
        return sorted(length for length in self._held[slot] if length > 0)

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        """A copy of the states after lengths[r] tokens of slot first_slot + r, [rows, ...]; None if all are 0.

        Raises ValueError for a state that is not kept.
        """
        for slot, length in enumerate(lengths, first_slot):
            if length and length not in self._held[slot]:
                kept = ", ".join(map(str, self.lengths(slot))) or "no tokens"
                raise ValueError(
                    f"slot {slot} cannot continue after {length} tokens, because its recurrent states are those after "
                    f"{kept}; feed the sequence again from its start, or allocate the cache with a larger max_rollback"
                )
        if self.block is None or not any(lengths):
            return None
        places = upload(places_of(first_slot, lengths, self.depth), self.block.device)
        states = self.block.flatten(0, 1).index_select(0, places)
        if empty := [row for row, length in enumerate(lengths) if length == 0]:
            states[upload(empty, states.device)] = 0
        return states

    def write(self, first_slot: int, lengths: Sequence[int], states: Tensor, places: Tensor) -> None:
        """Keep states [rows, ...] as those after lengths[r] >= 1 tokens of slot first_slot + r, see `places_of`."""
        if self.block is None:
            self.block = states.new_zeros(len(self._held), self.depth, *states.shape[1:])
        self.block.flatten(0, 1).index_copy_(0, places.to(self.block.device), states.to(self.block.dtype))
        for slot, length in enumerate(lengths, first_slot):
            self._held[slot][length % self.depth] = length

    def truncate(self, slot: int, length: int) -> None:
        """Forget the states after more than `length` tokens."""
        self._held[slot] = [held if held <= length else -1 for held in self._held[slot]]

    def copy(self, source: int, slot: int, length: int) -> None:
        """Let a slot continue after the first `length` tokens of another, or of itself. Raises as `read`."""
        states = self.read(source, [length])
        self.truncate(slot, length if slot == source else 0)
        if states is not None:
            self.write(slot, [length], states, upload(places_of(slot, [length], self.depth), states.device))


def places_of(first_slot: int, lengths: Sequence[int], depth: int) -> list[int]:
    """The places of the states after lengths[r] tokens of slot first_slot + r, counted over slots and ring."""
    return [slot * depth + length % depth for slot, length in enumerate(lengths, first_slot)]


class RecurrentLayer(LinearAttentionLayer):  # type: ignore[misc]  # transformers has no complete types
    """The states of one layer. During a call, those of its rows are where transformers expects them.

    A mixer is the module that reads and writes some of the states, given by their keys.
    """

    is_initialized = False  # it has no keys and values

    def __init__(self, cache: RecurrentCache, number_of_states: int, num_columns: int) -> None:
        super().__init__(number_of_states)
        self.cache = cache
        self.rings: dict[Key, StateRing] = {}

    def load(self, keys: Sequence[Key]) -> None:
        """Make the states after the rows' cached tokens current. Raises ValueError if one is not kept."""
        first_slot, starts = self.cache.window.slots.start, self.cache.starts
        for kind, index in keys:
            ring = self.rings.get((kind, index)) or self.cache.new_ring(kind)
            states = ring.read(first_slot, starts)
            for slot, start in enumerate(starts, first_slot):
                ring.truncate(slot, start)
            self.rings[kind, index] = ring
            current, is_allocated = self._current(kind)
            current[index], is_allocated[index] = states, states is not None
            self.has_previous_state[index] = states is not None
            self.device = None if states is None else states.device

    def save(self, keys: Sequence[Key], num_fed: int) -> None:
        """Keep the current states as those after the first num_fed tokens of the call."""
        lengths = [start + num_fed for start in self.cache.starts]
        for kind, index in keys:
            states = self._current(kind)[0][index]
            if states is not None:
                places = self.cache.places_after(num_fed, states.device)
                self.rings[kind, index].write(self.cache.window.slots.start, lengths, states, places)

    def _current(self, kind: str) -> tuple[dict[int, Tensor | None], dict[int, bool]]:
        if kind == "conv":
            return self.conv_states, self.is_conv_states_initialized
        return self.recurrent_states, self.is_recurrent_states_initialized


class RecurrentAttentionLayer(RecurrentLayer, _RaggedLayer):
    """A layer with attention beside its recurrent states."""

    def __init__(self, cache: RecurrentCache, number_of_states: int, num_columns: int) -> None:
        _RaggedLayer.__init__(self, cache, num_columns)
        RecurrentLayer.__init__(self, cache, number_of_states, num_columns)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Called with keys and values by position, and with recurrent states by name."""
        (_RaggedLayer if args else RecurrentLayer).lazy_initialization(self, *args, **kwargs)


def plain_cache(config: Any) -> Cache:
    """An empty cache of transformers' own for a model with this config, with one layer for each of the model's."""
    layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    return _of_minimax(Cache)(layers=layers) if config.model_type == "minimax" else Cache(layers=layers)


def recurrent_cache(
    config: Any, num_slots: int, capacity: int, depth: int, local: Sequence[LocalAttention | None] = ()
) -> RecurrentCache:
    """A cache for a model with this config. depth: states kept per slot. local: see `RaggedCache`."""
    kind = _of_minimax(RecurrentCache) if config.model_type == "minimax" else RecurrentCache
    return kind(plain_cache(config).layers, num_slots, capacity, depth, local)


class RecurrentCache(RaggedCache):
    """A ragged cache some of whose layers keep recurrent states.

    plain_layers: those of transformers' cache for the model. depth: states kept per slot.
    new_ring: makes the ring of a state, "conv" or "recurrent".
    starts: per row of the open window, the number of its cached tokens. is_prompt: whether the call reads a prompt, or
    a part of one, of which only the state after the end is kept.
    """

    def __init__(
        self,
        plain_layers: Sequence[Any],
        num_slots: int,
        capacity: int,
        depth: int,
        local: Sequence[LocalAttention | None] = (),
    ) -> None:
        super().__init__(len(plain_layers), num_slots, capacity, local)
        self.depth, self.starts, self.is_prompt = depth, [0], False
        self._places: dict[int, Tensor] = {}  # of the open window, by the number of tokens fed
        self.new_ring: Callable[[str], StateRing] = lambda kind: StateRing(num_slots, depth)
        for index, layer in enumerate(plain_layers):
            if isinstance(layer, LinearAttentionLayer):
                kind = RecurrentAttentionLayer if isinstance(layer, DynamicLayer) else RecurrentLayer
                self.layers[index] = kind(self, layer.number_of_states, self.num_columns(index))

    def open(
        self, first_slot: int, rows: int, width: int, device: torch.device, branches: Branches | None = None
    ) -> Tensor:
        if branches is not None:
            raise ValueError(
                "a recurrent state cannot be given to several branches of a token tree; use a method that drafts chains"
            )
        self.starts, self._places = self.num_cached[first_slot : first_slot + rows], {}
        return super().open(first_slot, rows, width, device)

    def places_after(self, num_fed: int, device: torch.device) -> Tensor:
        """The places in rings of the states after the first num_fed tokens of the open window, int64 [rows]."""
        if num_fed not in self._places:
            lengths = [start + num_fed for start in self.starts]
            self._places[num_fed] = upload(places_of(self.window.slots.start, lengths, self.depth), device)
        return self._places[num_fed]

    @property
    def rings(self) -> Iterator[StateRing]:
        """The states of all layers."""
        return (ring for layer in self.layers if isinstance(layer, RecurrentLayer) for ring in layer.rings.values())

    def states(self, slot: int, num_tokens: int) -> Iterator[tuple[int, Tensor]]:
        """The states after the first num_tokens >= 1 tokens of a slot, each with the index of its layer.

        Raises ValueError if they are not kept.
        """
        for index, layer in enumerate(self.layers):
            for ring in layer.rings.values() if isinstance(layer, RecurrentLayer) else ():
                states = ring.read(slot, [num_tokens])
                if states is not None:
                    yield index, states[0]

    def holds(self, slot: int, num_tokens: int) -> bool:
        is_kept = num_tokens == 0 or all(num_tokens in ring.lengths(slot) for ring in self.rings)
        return is_kept and super().holds(slot, num_tokens)

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        for ring in self.rings:
            ring.copy(source, slot, num_tokens)
        super().copy_slot(source, slot, num_tokens)


@cache
def _of_minimax(kind: Any) -> Any:
    """A kind of cache that is also what MiniMax insists on, a MiniMaxCache, with its names for recurrent states."""
    from transformers.models.minimax.modeling_minimax import MiniMaxCache  # imports the architecture

    class LayerCache(MiniMaxCache):  # type: ignore[misc]  # transformers has no complete types
        def __init__(self, layers: list[Any]) -> None:
            super().__init__()
            self.layers, self.layer_class_to_replicate = layers, None

        def get_linear_cache(self, layer_idx: int) -> Tensor | None:
            states: Tensor | None = self.get_recurrent_state(layer_idx)
            return states

        def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
            self.update_recurrent_state(linear_cache, layer_idx)
            self.layers[layer_idx].has_previous_state[0] = True

    return LayerCache if kind is Cache else type(f"MiniMax{kind.__name__}", (kind, LayerCache), {})
