"""Work of fixed shapes, recorded once on a GPU and replayed: CUDA graphs.

A decode step of a small model is bound by the host, which launches hundreds of kernels for it. A graph launches them
at once. What is recorded must not touch the host: no transfer, no decision about a tensor's content.

The graphs of a recorder compute in one pool of memory, so that together they need no more than the largest of them.
Replaying one overwrites whatever another has left there: all that is read after a replay, the inputs and outputs of
recordings, has memory of its own outside the pool.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from specdec.runtime.devices import on_device
from specdec.runtime.fallbacks import fall_back
from specdec.runtime.timing import synchronise

T = TypeVar("T")
Work = Callable[[], None]
_CAPACITY_STEP = 1024  # tokens


class Recorder:
    """Calls functions of tensors, as a CUDA graph from the second call with the same shapes on.

    device: where the tensors are. records: None for "if it is a GPU"; True on a CPU goes through the same motions,
    fixed inputs and outputs included, which is how they are tested.
    What a call returns is overwritten by the next call of the same function with the same shapes, and by nothing else.
    `seconds` is the time that first and recording calls took, compilation included.
    """

    def __init__(self, device: torch.device, records: bool | None = None) -> None:
        self.device, self.records = device, device.type == "cuda" if records is None else records
        self.seconds = 0.0
        self._recordings: dict[Hashable, Recording | None] = {}
        self._places: dict[Hashable, InPlace[Any]] = {}
        self._graphs: Graphs = CudaGraphs(device) if device.type == "cuda" else Repetition()

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), the arguments being tensors, hashable values, and tuples and frozen dataclasses of them."""
        if not self.records:
            return function(*args)
        with torch.inference_mode(), on_device(self.device):
            tensors: list[Tensor] = []
            key = (function, _structure(args, tensors))
            recording = self._recordings.get(key)
            if recording is not None:
                return cast("T", recording(tensors))
            start_s = time.perf_counter()
            try:
                return self._first(key, function, args)
            finally:
                synchronise(self.device)
                self.seconds += time.perf_counter() - start_s

    @torch.inference_mode()
    def place(self, value: T) -> InPlace[T]:
        """The value at a place that recordings read, one for all values of the same shapes, which it overwrites.

        For what changes less often than it is read: nothing is copied then when a recording is called.
        """
        tensors: list[Tensor] = []
        key = _structure(value, tensors)
        if key not in self._places:
            self._places[key] = InPlace(_replaced(value, iter([_copy(tensor) for tensor in tensors])))
        else:
            for fixed, tensor in zip(_tensors(self._places[key].value), tensors, strict=True):
                fixed.copy_(tensor, non_blocking=True)
        return self._places[key]

    def capacity(self, num_tokens: int) -> int:
        """How large a cache to allocate for so many tokens: in large steps, since recordings end with their cache.

        The extents that are seen follow from it, so that there are few of them, and all are even.
        """
        return -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP if self.records else num_tokens

    def forget(self) -> None:
        """Let go of everything that was recorded, and of its memory."""
        self._recordings.clear()
        self._places.clear()
        self._graphs.forget()

    def _first(self, key: Hashable, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        """The first call runs as it is, which also readies libraries and allocates caches; the second is recorded."""
        if key not in self._recordings:
            self._recordings[key] = None
            return function(*args)
        recording = self._recordings[key] = Recording(function, args, self._graphs)
        return cast("T", recording.outputs)


class InPlace(Generic[T]):
    """A tensor, or a value that holds tensors, which stays where it is: recordings use it there and copy nothing."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InPlace) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Recording:
    """One function at fixed places in memory.

    It runs once as it is recorded: `outputs` are then what it said, in the places where every call leaves them.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], graphs: Graphs) -> None:
        self._inputs = [tensor.clone() for tensor in _tensors(args)]
        fixed = _replaced(args, iter(self._inputs))
        self._run = lambda: function(*fixed)
        said = graphs.prepare(self._run)
        self.outputs = _replaced(said, iter([_copy(tensor) for tensor in _tensors(said)]))
        self._replay = graphs.capture(self._leave_outputs)

    def __call__(self, tensors: list[Tensor]) -> Any:
        for fixed, tensor in zip(self._inputs, tensors, strict=True):
            fixed.copy_(tensor, non_blocking=True)
        self._replay()
        return self.outputs

    def _leave_outputs(self) -> None:
        for fixed, tensor in zip(_tensors(self.outputs), _tensors(self._run()), strict=True):
            fixed.copy_(tensor)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


class Graphs(Protocol):
    """How work on tensors at fixed places is done again."""

    def prepare(self, run: Callable[[], T]) -> T:
        """Do work that is captured next, so that nothing is left to be set up, and return what it says."""
        ...

    def capture(self, run: Work) -> Work:
        """What does the work again. Capturing it does not do it."""
        ...

    def forget(self) -> None:
        """Nothing that was captured is called any more."""
        ...


class Repetition:
    """What there is instead of graphs on a CPU: the work itself."""

    def prepare(self, run: Callable[[], T]) -> T:
        return run()

    def capture(self, run: Work) -> Work:
        return run

    def forget(self) -> None:
        pass


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no garbage inside: destroying a graph of an engine that is gone would end a capture in progress."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaGraphs:
    """CUDA graphs of one device, which must be the current one, with one memory pool and one stream for capturing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def prepare(self, run: Callable[[], T]) -> T:
        """On the capturing stream: the libraries' workspaces, one a stream, then come from outside the pool."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            said = run()
        before.wait_stream(self._stream)
        return said

    def capture(self, run: Work) -> Work:
        """A graph's replay; the work itself where there can be no graph, which is a fallback.

        Raises torch.OutOfMemoryError.
        """
        graph = torch.cuda.CUDAGraph()
        failure = self._failure(graph, run)
        if failure is None:
            return graph.replay
        self._abandon_pool()
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        fall_back("a step cannot be recorded as a CUDA graph and runs as it is, which is slower", failure)
        return run

    def _failure(self, graph: torch.cuda.CUDAGraph, run: Work) -> RuntimeError | None:
        """Capture work, and return why it was not captured. The current stream is afterwards what it was before."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before, failure = torch.cuda.current_stream(self._device), None
        try:
            # thread_local: what other threads do with the device is no part of it, and is not forbidden meanwhile
            with (
                without_garbage_collection(),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    run()
                except RuntimeError as error:  # to end such a capture raises another error, which says less
                    failure = error
        except RuntimeError as error:
            failure = failure or error
        finally:  # torch 2.11 stays on the capturing stream where a capture does not end well
            torch.cuda.set_stream(before)
        return failure

    def _abandon_pool(self) -> None:
        """After a failed capture: the allocator may go on as if it were in progress, and refuses this pool."""
        with suppress(RuntimeError):  # it did end
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = None

    def forget(self) -> None:
        self._pool = None


# ---- tensors in nested tuples and dataclasses


def _structure(value: Any, tensors: list[Tensor]) -> Hashable:
    """What is left of a value when its tensors, which go to the list, are taken out: their shapes, and all else."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, tuple):
        return tuple(_structure(item, tensors) for item in value)
    if _is_record(value):
        return type(value), tuple(_structure(part, tensors) for part in _parts(value))
    return cast("Hashable", value)


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    _structure(value, tensors)
    return tensors


def _replaced(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with its tensors, in the order of `_structure`, replaced."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple):
        return tuple(_replaced(item, tensors) for item in value)
    if _is_record(value):
        return type(value)(*(_replaced(part, tensors) for part in _parts(value)))
    return value


def _parts(record: Any) -> list[Any]:
    """What a frozen dataclass is made from."""
    return [getattr(record, field.name) for field in fields(record) if field.init]


def _is_record(value: Any) -> bool:
    """Whether a value is what it holds: a frozen dataclass."""
    return is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen  # type: ignore
