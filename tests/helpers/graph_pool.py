"""CUDA graphs emulated on a CPU: work that is captured computes in a shared pool of memory, as torch's allocator does.

A graph reuses what those captured before it have freed. So replaying one overwrites what others left there: whatever
is still held of that is poisoned here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.dispatch import decomposed
from specdec.kernels import cpp
from specdec.proposers import tree
from specdec.sampling import state
from specdec.trees import verification

MiB = 1 << 20
OF_THE_HOST = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select")  # a constant or a read of the host


@dataclass(frozen=True)
class Block:
    """A range of addresses; blocks of a segment are merged when they are free."""

    start: int
    size: int
    segment: int
    is_small: bool

    @property
    def end(self) -> int:
        return self.start + self.size


class Pool:
    """Addresses as torch's caching allocator gives them out: the best fit, which is split; neighbours are merged."""

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._num_segments = 0

    def take(self, num_bytes: int) -> Block:
        size = max(512, -(-num_bytes // 512) * 512)
        is_small = size <= MiB
        fitting = [block for block in self._free if block.is_small == is_small and block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: (block.size, block.start))
            self._free.remove(block)
        else:
            block = self._segment(size, is_small)
        if block.size - size < (512 if is_small else MiB):
            return block
        self._free.append(Block(block.start + size, block.size - size, block.segment, is_small))
        return Block(block.start, size, block.segment, is_small)

    def give_back(self, block: Block) -> None:
        while True:
            neighbours = [
                other
                for other in self._free
                if (other.segment, other.is_small) == (block.segment, block.is_small)
                and (other.end == block.start or block.end == other.start)
            ]
            if not neighbours:
                break
            other = neighbours[0]
            self._free.remove(other)
            block = Block(min(block.start, other.start), block.size + other.size, block.segment, block.is_small)
        self._free.append(block)

    def _segment(self, size: int, is_small: bool) -> Block:
        self._num_segments += 1
        size = 2 * MiB if is_small else 20 * MiB if size < 10 * MiB else -(-size // (2 * MiB)) * 2 * MiB
        return Block(self._num_segments << 40, size, self._num_segments, is_small)


@dataclass
class Allocation:
    """A storage that was made during a capture, and where it is."""

    storage: weakref.ref[Any]
    dtype: torch.dtype
    block: Block


class Capture(TorchDispatchMode):
    """Gives each storage made inside a place in the pool, and undoes what is written to storages made outside.

    touched: all blocks that were written. left: what is still held. host: what a GPU would have had to wait for.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool, self.touched, self.host = pool, [], []
        self._made: dict[int, Allocation] = {}
        self._undone: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def left(self) -> list[Allocation]:
        return list(self._made.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = decomposed(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.removeprefix("aten::")
        has_mask = name.startswith("index") and any(each.dtype == torch.bool for each in _tensors(args[1:2]))
        if name in OF_THE_HOST or has_mask:
            self.host.append(name)
        self._remember_written(func, args, kwargs)
        given = {_key(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if _key(tensor) not in given | self._made.keys() and tensor.untyped_storage().nbytes():
                self._place(tensor)
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self._undone):
            tensor.copy_(before)
        self._undone.clear()

    def _remember_written(self, func: Any, args: Any, kwargs: Any) -> None:
        values = [*args, *(kwargs.get(argument.name) for argument in func._schema.arguments[len(args) :])]
        for argument, value in zip(func._schema.arguments, values, strict=True):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and _key(value) not in self._made:
                self._undone.append((value, value.clone()))

    def _place(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        block = self._pool.take(storage.nbytes())
        self._made[key] = Allocation(weakref.ref(storage), tensor.dtype, block)
        self.touched.append(block)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._pool.give_back(self._made.pop(key).block)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass
class EmulatedGraphs:
    """As `specdec.runtime.recording.CudaGraphs`.

    num_captured: so far. num_poisoned: how often a replay overwrote something that was still held. host: what captured
    work did that needs the host, which no graph can.
    """

    num_captured: int = 0
    num_poisoned: int = 0
    host: list[str] = field(default_factory=list)
    _pool: Pool = field(default_factory=Pool)
    _captures: list[Capture] = field(default_factory=list)

    def prepare(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        capture = Capture(self._pool)
        with capture:
            run()
        capture.undo()
        self._captures.append(capture)
        self.num_captured += 1
        self.host += capture.host

        def replay() -> None:
            run()
            for other in self._captures:
                if other is not capture:
                    self._poison(other.left, capture.touched)

        return replay

    def forget(self) -> None:
        self._pool = Pool()
        self._captures.clear()

    def _poison(self, left: list[Allocation], touched: list[Block]) -> None:
        for each in left:
            if any(block.start < each.block.end and each.block.start < block.end for block in touched):
                storage = each.storage()
                size = storage.nbytes() // each.dtype.itemsize
                torch.empty(0, dtype=each.dtype).set_(storage, 0, (size,)).fill_(3)
                self.num_poisoned += 1


def compute_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels for CPUs, and none of the ways that are faster there."""
    monkeypatch.setattr(cpp, "available", lambda dtype: False)
    for module in (state, tree):
        monkeypatch.setattr(module, "largest", lambda logits: tuple(logits.max(-1)))
    monkeypatch.setattr(verification, "_surely_none", lambda mask: False)
    monkeypatch.setattr(state, "_nucleus", lambda probs, top_p: probs.sort(dim=-1, descending=True).values)
