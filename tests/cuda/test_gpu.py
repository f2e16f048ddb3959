"""What only a GPU can tell about recording and about torch's operations there."""

from __future__ import annotations

import logging

import pytest
import torch

from specdec.kernels import gpu
from specdec.runtime import fallbacks
from specdec.runtime.recording import Recorder, Recording
from specdec.sampling import distributions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def graph_of(recording: Recording | None) -> object:
    return getattr(getattr(recording, "_replay", None), "__self__", None)


def test_a_failed_capture_spoils_no_other(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SPECDEC_STRICT", "0")
    fallbacks._warn_once.cache_clear()
    recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))

    def asks_the_device(x: torch.Tensor) -> torch.Tensor:
        return x + x.sum().item()

    def doubles(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    with caplog.at_level(logging.WARNING, "specdec"):
        for i in range(4):
            x = torch.full((2,), float(i), device="cuda")
            assert recorder(asks_the_device, x).tolist() == [3.0 * i] * 2
            assert recorder(doubles, x).tolist() == [2.0 * i] * 2
            assert recorder(doubles, x[:1]).tolist() == [2.0 * i]
    assert len(caplog.records) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    graphs = [graph_of(recording) for recording in recorder._recordings.values()]
    assert [isinstance(graph, torch.cuda.CUDAGraph) for graph in graphs] == [False, True, True]


def test_the_memory_of_graphs_is_let_go() -> None:
    recorder = Recorder(torch.device("cuda", torch.cuda.current_device()))

    def takes_memory(x: torch.Tensor) -> torch.Tensor:
        return (x.expand(1 << 26, 1) + 1).sum(0)  # 256 MiB on the way

    before, _ = torch.cuda.mem_get_info()
    for _ in range(3):
        for _ in range(3):
            assert recorder(takes_memory, torch.zeros(1, device="cuda")).item() == 1 << 26
        recorder.forget()
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] < 1 << 27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("triton", [False, True])
def test_the_lowest_of_the_largest_is_chosen(dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        monkeypatch.setattr(gpu, "for_gpu", lambda tensor: None)
    generator = torch.Generator().manual_seed(0)
    for size in (61, 1000, 49152, 151_936):
        logits = torch.randint(0, 3, (8, 2, size), generator=generator).to(dtype)
        peak, argmax = distributions.largest(logits.cuda())
        assert peak.eq(2).all()
        assert argmax.cpu().equal(logits.eq(2).int().argmax(-1))


def test_the_clock_tells_how_long_the_parts_of_a_graph_take() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    now_ns = gpu.clock(device)
    if now_ns is None:
        pytest.skip("needs a GPU that runs Triton kernels")
    recorder = Recorder(device)

    def timed(x: torch.Tensor) -> torch.Tensor:
        moments = [now_ns()]
        for size in (1, 10):
            for _ in range(size):
                x = x @ x
            moments.append(now_ns())
        return torch.cat(moments)

    x = torch.zeros(2048, 2048, device=device)
    for _ in range(4):
        start, middle, end = recorder(timed, x).tolist()
        assert 0 < middle - start < end - middle
    assert 5 < (end - middle) / (middle - start) < 20
