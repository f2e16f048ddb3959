"""CUDA graphs: computations of fixed shapes, captured once on a GPU and replayed.

A decode step of a small model is limited by the host, which launches hundreds of kernels; a graph launches them all at
once. Captured code must not involve the host: no transfers, no decisions based on tensor values.

All graphs of a recorder share one memory pool, so together they need no more memory than the largest. A replay
overwrites what another graph left in the pool; everything read after a replay, that is inputs and outputs, therefore
has its own memory outside the pool.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor

from specdec.runtime.devices import on_device, upload_into
from specdec.runtime.fallbacks import fall_back
from specdec.runtime.timing import synchronize

T = TypeVar("T")
Work = Callable[[], None]
_CAPACITY_STEP = 1024  # tokens


class Recorder:
    """Calls functions of tensors, from the second call with the same shapes on as a CUDA graph.

    The result of a call is overwritten by the next call of the same function with the same shapes, and by nothing
    else. `seconds` is the total time of first and capturing calls, including compilation.

    device: where the tensors are. records: None records on GPUs only; True on a CPU uses the same fixed inputs and
    outputs without graphs, for tests.
    """

    def __init__(self, device: torch.device, records: bool | None = None) -> None:
        self.device, self.records = device, device.type == "cuda" if records is None else records
        self.seconds = 0.0
        self._recordings: dict[Hashable, Recording | None] = {}
        self._places: dict[Hashable, tuple[InPlace[Any], Any]] = {}  # with the value that was copied last
        self._uploads: dict[tuple[int, int], InPlace[Tensor]] = {}
        self._graphs: Graphs = CudaGraphs(device) if device.type == "cuda" else Repetition()

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args). Arguments are tensors, hashable values, and tuples and frozen dataclasses of these."""
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
                synchronize(self.device)
                self.seconds += time.perf_counter() - start_s

    @torch.inference_mode()
    def place(self, value: T) -> InPlace[T]:
        """Copy a value into the fixed buffer shared by all values of the same shapes, which recordings read in place.

        For values that change less often than they are read: neither placing the same object again nor calling a
        recording copies anything. The value must not change.
        """
        tensors: list[Tensor] = []
        key = _structure(value, tensors)
        placed, last = self._places.get(key, (None, None))
        if placed is None:
            placed = InPlace(_replaced(value, iter([_copy(tensor) for tensor in tensors])))
        elif last is not value:
            for fixed, tensor in zip(_tensors(placed.value), tensors, strict=True):
                fixed.copy_(tensor, non_blocking=True)
        self._places[key] = placed, value
        return cast("InPlace[T]", placed)

    @torch.inference_mode()
    def upload(self, rows: Sequence[Sequence[int]]) -> InPlace[Tensor]:
        """Numbers of each row as int64 [rows, n], in a fixed buffer that all uploads of this shape share.

        It takes one transfer and no kernel. A later upload overwrites it, in the order of the device's work.
        """
        key = len(rows), len(rows[0])
        if key not in self._uploads:
            self._uploads[key] = InPlace(torch.zeros(key, dtype=torch.int64, device=self.device))
        upload_into(self._uploads[key].value, rows)
        return self._uploads[key]

    def capacity(self, num_tokens: int) -> int:
        """The cache capacity to allocate for num_tokens tokens: in large steps, as recordings are tied to a cache.

        Attention extents follow from it, so they are few and even.
        """
        return -(-num_tokens // _CAPACITY_STEP) * _CAPACITY_STEP if self.records else num_tokens

    def forget(self) -> None:
        """Drop all recordings and free their memory."""
        self._recordings.clear()
        self._places.clear()
        self._uploads.clear()
        self._graphs.forget()

    def _first(self, key: Hashable, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        """The first call runs normally, which initializes libraries and allocates caches; the second is captured."""
        if key not in self._recordings:
            self._recordings[key] = None
            return function(*args)
        recording = self._recordings[key] = Recording(function, args, self._graphs)
        return cast("T", recording.outputs)


class InPlace(Generic[T]):
    """A tensor, or a value with tensors, at a fixed address that recordings use without copying."""

    def __init__(self, value: T) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InPlace) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Recording:
    """One function with inputs and outputs at fixed addresses.

    It runs once while it is captured; `outputs` then holds the results, where every later call leaves its own.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], graphs: Graphs) -> None:
        self._inputs = [tensor.clone() for tensor in _tensors(args)]
        fixed = _replaced(args, iter(self._inputs))
        self._run = lambda: function(*fixed)
        result = graphs.prepare(self._run)
        self.outputs = _replaced(result, iter([_copy(tensor) for tensor in _tensors(result)]))
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
    """Captures and replays work on tensors at fixed addresses."""

    def prepare(self, run: Callable[[], T]) -> T:
        """Run work once before it is captured, so that nothing is left to initialize; returns its result."""
        ...

    def capture(self, run: Work) -> Work:
        """A function that repeats the work. Capturing does not run it."""
        ...

    def forget(self) -> None:
        """Captured work will not be called again."""
        ...


class Repetition:
    """The CPU's substitute for graphs: runs the work again."""

    def prepare(self, run: Callable[[], T]) -> T:
        return run()

    def capture(self, run: Work) -> Work:
        return run

    def forget(self) -> None:
        pass


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: destroying the graph of a collected engine would abort a capture in progress."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class CudaGraphs:
    """CUDA graphs on one device, which must be current, with one memory pool and one capture stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def prepare(self, run: Callable[[], T]) -> T:
        """Run on the capture stream, so that the libraries' per-stream workspaces are allocated outside the pool."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        before = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(before)
        with torch.cuda.stream(self._stream):
            result = run()
        before.wait_stream(self._stream)
        return result

    def capture(self, run: Work) -> Work:
        """The replay of a graph, or as a fallback the work itself if it cannot be captured.

        Raises torch.OutOfMemoryError.
        """
        graph = torch.cuda.CUDAGraph()
        failure = self._failure(graph, run)
        if failure is None:
            return graph.replay
        self._abandon_pool()
        if isinstance(failure, torch.OutOfMemoryError):
            raise failure
        fall_back("a step cannot be captured as a CUDA graph and runs eagerly, which is slower", failure)
        return run

    def _failure(self, graph: torch.cuda.CUDAGraph, run: Work) -> RuntimeError | None:
        """Capture work; returns the reason if that failed. Restores the current stream."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        before, failure = torch.cuda.current_stream(self._device), None
        try:
            # thread_local: other threads may use the device meanwhile, and are not captured
            with (
                without_garbage_collection(),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    run()
                except RuntimeError as error:  # ending the capture raises a less specific error
                    failure = error
        except RuntimeError as error:
            failure = failure or error
        finally:  # torch 2.11 stays on the capture stream after a failed capture
            torch.cuda.set_stream(before)
        return failure

    def _abandon_pool(self) -> None:
        """After a failed capture the allocator may consider it in progress and reject this pool."""
        with suppress(RuntimeError):  # the capture did end
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        self._pool = None

    def forget(self) -> None:
        self._pool = None


# ---- tensors in nested tuples and dataclasses


def _structure(value: Any, tensors: list[Tensor]) -> Hashable:
    """A hashable key of a value with its tensors replaced by shape and dtype; the tensors are appended to the list."""
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
    """The constructor arguments of a frozen dataclass."""
    return [getattr(record, field.name) for field in fields(record) if field.init]


def _is_record(value: Any) -> bool:
    """Whether a value is an instance of a frozen dataclass."""
    return is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen  # type: ignore
