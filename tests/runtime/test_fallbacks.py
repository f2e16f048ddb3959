"""A fallback to a slower path warns users once and is an error in tests and benchmarks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specdec.runtime import fallbacks
from specdec.runtime.fallbacks import FallbackError, fall_back
from specdec.runtime.recording import CudaGraphs

GPU = torch.device("cuda", 0)


@pytest.fixture
def for_users(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SPECDEC_STRICT")
    fallbacks._warn_once.cache_clear()
    yield
    fallbacks._warn_once.cache_clear()


def test_it_is_an_error_in_tests() -> None:
    assert os.environ["SPECDEC_STRICT"] == "1"
    with pytest.raises(FallbackError, match=r"^it runs slowly: no wheels; set SPECDEC_STRICT=0 to continue anyway$"):
        fall_back("it runs slowly", "no wheels")


def test_users_are_warned_once(for_users: None, caplog: pytest.LogCaptureFixture) -> None:
    for cause in ("no wheels", ValueError("no wheels\nand no engine"), KeyError()):
        for _ in range(2):
            fall_back("it runs slowly", cause)
    assert [record.getMessage() for record in caplog.records] == [
        "it runs slowly: no wheels",
        "it runs slowly: KeyError",
    ]


class Cuda:
    """torch.cuda as far as capturing needs it. failures: what ends each capture, None for nothing."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures, self.pools, self.streams, self.ended = list(failures), [], ["main"], []

    def graph(self, graph: Any, pool: Any, stream: Any, capture_error_mode: str) -> Cuda:
        assert pool not in self.ended
        self.pools.append(pool)
        self.streams.append(stream)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *args: object) -> None:
        failure = self.failures.pop(0)
        if failure:  # as torch 2.11: the stream stays
            raise failure
        self.streams.append("main")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda, number = Cuda(), iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "aside")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(number)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: cuda.streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", cuda.streams.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: cuda.ended.append(pool), raising=False
    )
    return cuda


class Graph:
    def replay(self) -> str:
        return "replayed"


def fails(error: Exception) -> Any:
    def run() -> None:
        raise error

    return run


def nothing() -> None:
    pass


def test_captures_share_a_pool_until_all_is_forgotten(cuda: Cuda) -> None:
    cuda.failures, graphs = [None] * 3, CudaGraphs(GPU)
    assert graphs.capture(nothing)() == "replayed"
    graphs.capture(nothing)
    graphs.forget()
    graphs.capture(nothing)
    assert cuda.pools == [(0, 0), (0, 0), (0, 1)]


def test_a_failed_capture_is_an_error_that_names_its_cause(cuda: Cuda) -> None:
    cuda.failures, graphs = [RuntimeError("capture invalid")], CudaGraphs(GPU)
    with pytest.raises(FallbackError, match=r"cannot be captured as a CUDA graph and runs eagerly.*: not permitted;"):
        graphs.capture(fails(RuntimeError("not permitted")))
    assert cuda.streams[-1] == "main"


def test_a_failed_capture_spoils_no_other(for_users: None, cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.failures, graphs = [RuntimeError("capture invalid"), None, None], CudaGraphs(GPU)
    run = fails(RuntimeError("not permitted"))
    assert graphs.capture(run) is run
    assert cuda.streams[-1] == "main"
    assert cuda.ended == [(0, 0)]
    assert graphs.capture(nothing)() == graphs.capture(nothing)() == "replayed"
    assert cuda.pools == [(0, 0), (0, 1), (0, 1)]
    assert len(caplog.records) == 1


@pytest.mark.parametrize("at_the_end", [False, True])
def test_running_out_of_memory_is_no_fallback(for_users: None, cuda: Cuda, at_the_end: bool) -> None:
    out_of_memory = torch.OutOfMemoryError("out of memory")
    cuda.failures = [out_of_memory if at_the_end else RuntimeError("capture invalid")]
    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs(GPU).capture(nothing if at_the_end else fails(out_of_memory))
    assert cuda.streams[-1] == "main"


def test_no_garbage_is_collected_during_a_capture(cuda: Cuda, for_users: None) -> None:
    """It may hold graphs of engines that are gone, and to destroy one ends the capture (seen on an H100)."""
    cuda.failures, seen = [None, RuntimeError("cannot")], []
    graphs = CudaGraphs(GPU)
    for _ in range(2):
        graphs.capture(lambda: seen.append(gc.isenabled()))
        assert gc.isenabled()
    assert seen == [False, False]
