"""Work of fixed shapes, recorded once on a GPU and replayed: CUDA graphs, and functions compiled by torch.

A decode step of a small model is bound by the host, which launches hundreds of kernels for it. A graph launches them
at once. What is recorded must not touch the host: no transfer, no decision about a tensor's content.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from specdec.timing import synchronise
from specdec.wheels import cache_root

T = TypeVar("T")


class Recorder:
    """Calls functions of tensors, as a CUDA graph from the second call with the same shapes on.

    device: where the tensors are. records: None for "if it is a GPU"; True on a CPU goes through the same motions,
    fixed inputs and outputs included, which is how they are tested.
    What a call returns is overwritten by the next call of the same function with the same shapes.
    `seconds` is the time that first and recording calls took, compilation included.
    """

    def __init__(self, device: torch.device, records: bool | None = None) -> None:
        self.device, self.records = device, device.type == "cuda" if records is None else records
        self.seconds = 0.0
        self._recordings: dict[Hashable, Recording | None] = {}
        self._pool: Any = None

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """function(*args), the arguments being tensors, hashable values, and tuples and frozen dataclasses of them."""
        if not self.records:
            return function(*args)
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

    def forget(self) -> None:
        """Let go of everything that was recorded."""
        self._recordings.clear()

    def _first(self, key: Hashable, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        """The first call runs as it is, which also readies libraries and compiles; the second is recorded."""
        if key not in self._recordings:
            self._recordings[key] = None
            return function(*args)
        if self._pool is None and self.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        recording = Recording(function, args, self.device, self._pool)
        self._recordings[key] = recording
        return cast("T", recording(_tensors(args)))


class InPlace:
    """A tensor that stays where it is: recordings read it there instead of copying it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, InPlace) and other.tensor is self.tensor

    def __hash__(self) -> int:
        return id(self.tensor)


class Recording:
    """One function at fixed places in memory.

    Where it cannot be recorded it is called instead, which is said once.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], device: torch.device, pool: Any) -> None:
        self._inputs = [tensor.clone() for tensor in _tensors(args)]
        fixed = _replaced(args, iter(self._inputs))
        self._run: Callable[[], Any] = lambda: function(*fixed)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None
        if device.type == "cuda":
            self._graph, self._outputs = _capture(self._run, pool)

    def __call__(self, tensors: list[Tensor]) -> Any:
        for fixed, tensor in zip(self._inputs, tensors, strict=True):
            fixed.copy_(tensor, non_blocking=True)
        if self._graph:
            self._graph.replay()
        elif self._outputs is None:
            self._outputs = self._run()
        else:
            for fixed, tensor in zip(_tensors(self._outputs), _tensors(self._run()), strict=True):
                fixed.copy_(tensor)
        return self._outputs


def _capture(run: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph | None, Any]:
    """A graph and what it leaves where; twice None where it cannot be recorded, which is said once."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            outputs = run()
        return graph, outputs
    except RuntimeError as error:
        _say_once("a step could not be recorded as a CUDA graph", _reason(error))
        return None, None


@dataclass(slots=True)
class Compiled:
    """A function by torch.compile, as one graph; as it is where there is no compiler, or it does not compile.

    What was compiled is kept in the cache folder, for the next start.
    """

    function: Callable[..., Any]
    _compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "inductor"))
            self._compiled = torch.compile(self.function, fullgraph=True)
        try:
            return self._compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, ImportError, OSError) as error:
            _say_once(f"{self.function.__name__} does not compile", _reason(error))
            self._compiled = self.function
            return self.function(*args)


@cache
def _say_once(what: str, reason: str) -> None:
    logging.getLogger("specdec").warning("%s and runs as it is, which is slower: %s", what, reason)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- tensors in nested tuples and dataclasses


def _structure(value: Any, tensors: list[Tensor]) -> Hashable:
    """What is left of a value when its tensors, which go to the list, are taken out: their shapes, and all else."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype
    if isinstance(value, tuple):
        return tuple(_structure(item, tensors) for item in value)
    if _is_record(value):
        return type(value), tuple(_structure(getattr(value, field.name), tensors) for field in fields(value))
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
        return type(value)(*(_replaced(getattr(value, field.name), tensors) for field in fields(value)))
    return value


def _is_record(value: Any) -> bool:
    """Whether a value is what it holds: a frozen dataclass."""
    return is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen  # type: ignore
