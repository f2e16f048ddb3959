"""Decoding on a GPU that is not there: fake CUDA tensors, which have shapes and devices but no content.

It needs torch's CUDA build. Every number that is read is 1. Everything else runs as it does on a GPU, but for graphs:
what would be captured is run once with a watch on it, and replaying does nothing.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.dispatch import decomposed

DEVICE = torch.device("cuda", 0)
DATA_DEPENDENT = ("nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2", "bincount")


@dataclass(frozen=True)
class Event:
    """Something that happens between host and device: what, of which shape, where in the source, and in a capture?

    kind: "read" and "wait" (the host waits for the device, to read a tensor or for an event), "download", "upload"
    (without waiting), "blocking upload", "data-dependent shape", "mask as an index", "host index".
    """

    kind: str
    shape: tuple[int, ...]
    place: str
    is_captured: bool


@dataclass
class Watch:
    """What happened. num_captures, num_replays: of graphs. num_kernels: launched one by one, outside of captures."""

    events: list[Event] = field(default_factory=list)
    num_kernels: int = 0
    num_captures: int = 0
    num_replays: int = 0
    is_capturing: bool = False

    def note(self, kind: str, tensor: Tensor) -> None:
        self.events.append(Event(kind, tuple(tensor.shape), _place(), self.is_capturing))

    def of_kind(self, *kinds: str) -> list[Event]:
        return [event for event in self.events if event.kind in kinds]

    @property
    def in_captures(self) -> list[Event]:
        return [event for event in self.events if event.is_captured]

    def clear(self) -> None:
        self.events, self.num_replays, self.num_captures, self.num_kernels = [], 0, 0, 0


class WatchedGraphs:
    """As `specdec.runtime.recording.CudaGraphs`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def prepare(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self._watch.is_capturing = True
        try:
            run()
        finally:
            self._watch.is_capturing = False
        self._watch.num_captures += 1

        def replay() -> None:
            self._watch.num_replays += 1

        return replay

    def forget(self) -> None:
        pass


class _Operations(TorchDispatchMode):
    """Tells the watch which operations cross between host and device."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        result = decomposed(self, func, args, kwargs)
        if result is not NotImplemented:
            return result
        if name == "_local_scalar_dense":
            if args[0].is_cuda:
                self._watch.note("read", args[0])
            return 1
        if name in DATA_DEPENDENT and args[0].is_cuda:
            self._watch.note("data-dependent shape", args[0])
        if name in ("index", "index_put", "index_put_"):
            self._check_indices(args[0], args[1])
        if name == "_to_copy" and kwargs.get("device") is not None:
            to = torch.device(kwargs["device"])
            self._note_transfer(args[0], to.type, kwargs.get("non_blocking", False))
            if to.type == "cuda" and not args[0].is_cuda:  # fake tensors are only moved to what is there
                return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=to)
        if name == "copy_":
            is_async = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self._note_transfer(args[1], args[0].device.type, is_async)
        if name == "lift_fresh" and self._watch.is_capturing:
            self._watch.note("blocking upload", args[0])  # a constant of the host's
        result = func(*args, **kwargs)
        self._watch.num_kernels += not self._watch.is_capturing and _is_kernel(func, name, result)
        return result

    def _check_indices(self, tensor: Tensor, indices: Any) -> None:
        for index in indices:
            if index is not None and tensor.is_cuda:
                if index.dtype == torch.bool:
                    self._watch.note("mask as an index", index)
                if not index.is_cuda:
                    self._watch.note("host index", index)

    def _note_transfer(self, tensor: Tensor, to: str, is_async: bool) -> None:
        if to == "cuda" and not tensor.is_cuda:
            self._watch.note("upload" if is_async else "blocking upload", tensor)
        if to == "cpu" and tensor.is_cuda:
            self._watch.note("download" if is_async else "read", tensor)


def _is_kernel(func: Any, name: str, result: Any) -> bool:
    """Whether an operation has a GPU compute: neither a view nor memory to be filled."""
    returned = [each.alias_info for each in func._schema.returns]
    is_view = bool(returned) and returned[0] is not None and not returned[0].is_write
    return isinstance(result, Tensor) and result.is_cuda and not is_view and "empty" not in name


class _Properties:
    """Of an H100, as far as they are asked for."""

    shared_memory_per_block_optin = 227 << 10


class _Mark:
    """As `torch.cuda.Event`."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def record(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        self._watch.note("wait", torch.empty(0))


def _place() -> str:
    """The lines of the library, or else of transformers, that are being run, the innermost first."""
    frames = [frame for frame in traceback.extract_stack() if "/specdec/" in frame.filename]
    return " < ".join(f"{frame.filename.split('/specdec/')[-1]}:{frame.lineno}" for frame in reversed(frames[-3:]))


class _NoStopwatch:
    def __init__(self, device: torch.device) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def add(self, name: str, seconds: float) -> None:
        pass

    def seconds(self) -> dict[str, float]:
        return {}


def attention(backend: str) -> Callable[..., Tensor]:
    """Attention as a GPU's own kernel lays it out: "cudnn" or "efficient"."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
    ) -> Tensor:
        scale = options.get("scale")
        if backend == "cudnn":
            return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, attn_mask, False, scale=scale)[0]
        bias = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]

    return attend


def _launcher(watch: Watch) -> Callable[..., None]:
    """What launches a Triton kernel, and only looks at where the tensors are."""

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        watch.num_kernels += not watch.is_capturing
        for value in (*args, *kwargs.values()):
            assert not isinstance(value, Tensor) or value.is_cuda, f"{kernel} is given a tensor on {value.device}"

    return launch


def replacements(watch: Watch, backend: str) -> dict[str, Any]:
    """What the project's own names are replaced by: they need a real device, or compare numbers."""
    return {
        "specdec.runtime.timing.synchronize": lambda device: None,
        "specdec.runtime.recording.synchronize": lambda device: None,
        "specdec.runtime.recording.CudaGraphs": lambda device: WatchedGraphs(watch),
        "specdec.runtime.recording.on_device": lambda device: contextlib.nullcontext(),
        "specdec.decoding.Stopwatch": _NoStopwatch,
        "specdec.decoding.now_s": lambda device: 0.0,
        "specdec.models.trial.check_ragged_equals_plain": lambda lm: None,
        "specdec.models.trial.check_tree_equals_plain": lambda lm: None,
        "specdec.heads.eagle.check_draft_vocabulary": lambda tokens, vocab_size: tokens,
        "specdec.models.fusion.layers.scaled_dot_product_attention": attention(backend),
    }


@contextlib.contextmanager
def fake_gpu(backend: str = "cudnn", *, triton: bool = False) -> Iterator[Watch]:
    """Inside, CUDA tensors are fake, and what the host and the device say to each other is watched.

    backend: of torch's attention. triton: whether it is a GPU that the Triton kernels are for; they compute nothing.
    """
    from triton.runtime.jit import JITFunction

    watch = Watch()

    def tolist(tensor: Tensor) -> Any:
        if tensor.is_cuda:
            watch.note("read", tensor)
        return _ones(tuple(tensor.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", _launcher(watch))
        patch.setattr(torch.cuda, "Event", lambda **options: _Mark(watch))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties())
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if triton else (7, 5))
        patch.setenv("SPECDEC_STRICT", "1" if triton else "0")  # without them one kind of fallback is meant
        for name, replacement in replacements(watch, backend).items():
            patch.setattr(name, replacement)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention(backend))
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(FakeTensor, "tolist", tolist)
        _forget_constants()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _Operations(watch):
                yield watch
        finally:
            _forget_constants()


def _ones(shape: tuple[int, ...]) -> Any:
    return [_ones(shape[1:]) for _ in range(shape[0])] if shape else 1


def _forget_constants() -> None:
    """Tensors that the library keeps for good are fake inside, and real outside."""
    for name, module in list(sys.modules.items()):
        if name.startswith("specdec"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
