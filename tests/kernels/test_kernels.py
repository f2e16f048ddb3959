"""Kernels for CPUs against torch, and what happens where there are none."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch

from specdec.kernels import cpp, gpu
from specdec.models.fusion import Norm, Projection
from specdec.runtime.fallbacks import FallbackError
from specdec.sampling import randomness
from specdec.sampling.distributions import Dense, race

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpp.available(dtype)]
needs_kernels = pytest.mark.skipif(not DTYPES, reason="kernels need Linux, a C++ compiler and AVX-512")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias"), [(64, 96, False), (64, 96, True), (2, 1, True), (50, 33, False)]
)
def test_a_projection_is_a_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    projection = Projection(linear)
    assert projection.kernel is not None
    exact = copy.deepcopy(linear).double()
    with torch.inference_mode():
        for num_tokens in (*range(1, 14), 24, 25, 100):
            x = torch.randn(num_tokens, inputs, dtype=dtype)
            expected = exact(x.double())
            tolerance = 1e-6 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(projection(x).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalisation(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(48, eps=1e-5, dtype=dtype)
    norm.weight.data.normal_()
    norm.variance_epsilon = norm.eps
    x = (torch.randn(2, 48, 3, dtype=dtype) * 5).transpose(1, 2)
    expected = torch.nn.functional.rms_norm(x.double(), (48,), norm.weight.double(), 1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(Norm(norm)(x).double(), expected, rtol=tolerance, atol=tolerance)


class GemmaRMSNorm(torch.nn.Module):
    """As in transformers: the factors 1 + w multiply in float32, before the only rounding."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.weight = 1e-6, torch.nn.Parameter(torch.randn(size).to(dtype), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_gemma_rounds_once(dtype: torch.dtype) -> None:
    """Its bits are those of transformers, but for sums of squares in another order; rounding twice is seen."""
    torch.manual_seed(0)
    norm, x = GemmaRMSNorm(640, dtype), torch.randn(200, 640).mul(5).to(dtype)
    expected, actual = norm(x), Norm(norm)(x)
    assert Norm(norm).has_kernel
    torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=0)
    twice = torch.nn.functional.rms_norm(x, (640,), eps=norm.eps) * (1 + norm.weight)
    different, if_rounded_twice = (float((each != expected).float().mean()) for each in (actual, twice))
    assert dtype == torch.float32 or different < 0.01 < if_rounded_twice


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
@pytest.mark.parametrize("cap", [4.0, 30.0])
def test_a_softcap(cap: float, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 40, size).mul(cap).to(dtype)
    x[0, :3, 0] = torch.tensor([0.0, -1e4, 1e-6])
    x = torch.cat([x, -x])
    expected = cap * torch.tanh(x.double() / cap)
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(cpp.softcap(x.clone(), cap).double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_the_largest_logit_and_its_probability(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 40, size).mul(4).round().to(dtype)  # with ties
    logits[0, 0], logits[0, 1, 0], logits[1, 2, -1] = -torch.inf, torch.nan, torch.inf
    logits = logits.transpose(0, 1)
    peaks, places = cpp.largest(logits)
    assert torch.equal(places[1:], torch.from_numpy(logits[1:].float().numpy().argmax(-1)))
    torch.testing.assert_close(peaks, logits.amax(-1), equal_nan=True, rtol=0, atol=0)
    expected = logits[3:].double().softmax(-1).amax(-1).float()
    torch.testing.assert_close(cpp.confidence(logits)[3:], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 17, 1000])
def test_softmax(size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 3, size).mul(4).to(dtype)
    logits[0, 0], logits[1, 1, 0], logits[2, 2, -1] = -torch.inf, torch.nan, torch.inf
    logits[3:, :, 1::2] = -torch.inf
    temperatures = torch.rand(40, 3) + 0.1
    probs, expected = cpp.softmax(logits, temperatures), (logits.double() / temperatures[..., None]).softmax(-1)
    torch.testing.assert_close(probs.double(), expected, rtol=2e-5, atol=1e-30, equal_nan=True)
    assert not probs[3:, :, 1::2].any()
    assert probs[[0, 1, 2], [0, 1, 2]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_a_quarter_of_a_million(dtype: torch.dtype) -> None:
    """As Gemma's: the largest logit, its probability, the distribution and a draw are those of torch."""
    torch.manual_seed(0)
    logits = torch.randn(5, 262_144).mul(4).to(dtype)
    logits[torch.arange(5), torch.tensor([0, 17, 131_071, 262_128, 262_143])] = 40.0
    logits[0, 262_143] = 40.0  # a tie: the first one wins
    assert cpp.largest(logits)[1].tolist() == [0, 17, 131_071, 262_128, 262_143]
    exact = logits.double().softmax(-1)
    torch.testing.assert_close(cpp.confidence(logits).double(), exact.amax(-1), rtol=1e-5, atol=0)
    probs = cpp.softmax(logits.mul(0.1), torch.ones(5))
    torch.testing.assert_close(probs.double(), logits.mul(0.1).double().softmax(-1), rtol=2e-5, atol=1e-30)
    uniforms = torch.rand(5, dtype=torch.float64)
    assert torch.equal(cpp.draw(probs, uniforms), Dense(probs.double()).draw(uniforms))


@needs_kernels
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_a_draw_is_the_one_of_the_cumulative_distribution(size: int) -> None:
    """In float64 by torch; at 0, at the largest uniform below 1 and between, with tokens that have no probability."""
    torch.manual_seed(0)
    probs = torch.rand(500, size) * (torch.rand(500, size) < 0.3)
    probs[:, torch.randint(size, ())] = 0.01
    uniforms = torch.rand(500, dtype=torch.float64)
    uniforms[:100], uniforms[100:200] = 0, 1 - 2.0**-53
    drawn = cpp.draw(probs, uniforms)
    assert torch.equal(drawn, Dense(probs.double()).draw(uniforms))
    assert (probs.gather(1, drawn[:, None]) > 0).all()


@needs_kernels
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_race_is_the_one_by_torch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tokens that have no probability, many of one probability, and uniforms of 0 and the largest below 1."""
    torch.manual_seed(0)
    probs = torch.rand(3, 200, size).mul(4).round() * torch.rand(3, 200, size).exp()
    probs[..., torch.randint(size, ())] = 1e-30
    uniforms = torch.rand(3, 200, size, dtype=torch.float64)
    uniforms[0, :50], uniforms[1, :50, ::2], uniforms[2, :50] = 0, 1 - 2.0**-53, 1e-300
    won = race(probs, uniforms)
    assert (probs.gather(-1, won.unsqueeze(-1)) > 0).all()
    monkeypatch.setattr(cpp, "supports", lambda tensor: False)
    assert torch.equal(won, race(probs, uniforms))


@needs_kernels
@pytest.mark.parametrize("size", [1, 7, 8, 200])
def test_uniforms_broadcast_along_every_axis(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(3, 1, 1), (1, 4, 1), (1,), (size,)]
    arguments = [torch.arange(math.prod(shape)).view(shape) * 7_919 for shape in shapes]
    fast = randomness.uniforms(*arguments)
    assert fast.shape == (3, 4, size)
    monkeypatch.setattr(cpp, "available", lambda dtype: False)
    assert torch.equal(fast, randomness.uniforms(*arguments))


@needs_kernels
def test_uniforms_are_those_of_philox(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = torch.tensor([[-5], [2**63 - 1], [0]])
    arguments = (torch.arange(200) * 999_983, torch.tensor(3), torch.arange(200) * 7919)
    fast = randomness.uniforms(seeds, *arguments)
    monkeypatch.setattr(cpp, "available", lambda dtype: False)
    assert torch.equal(fast, randomness.uniforms(seeds, *arguments))


@pytest.mark.parametrize(
    ("compiler", "message"), [("no-such-compiler", "no C\\+\\+ compiler was found"), ("false", "false failed")]
)
def test_without_a_working_compiler_torch_is_used_with_a_warning(
    compiler: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    with pytest.raises(FallbackError, match=message):
        cpp._library.__wrapped__()
    monkeypatch.setenv("SPECDEC_STRICT", "0")
    assert cpp._library.__wrapped__() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels for this CPU are not used, decoding is slower: ")
    assert re.search(message, record.getMessage())


needs_any = pytest.mark.skipif(not DTYPES, reason="kernels need Linux, a C++ compiler and AVX-512")


@pytest.fixture
def one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file that compiles in a second: how a library is kept does not depend on what is in it."""
    monkeypatch.setattr(cpp, "_SOURCES", [path for path in cpp._SOURCES if path.name == "sampling.cpp"])


@needs_any
@pytest.mark.usefixtures("one_source")
def test_kernels_that_were_replaced_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a file of the same size, in a folder that nobody else can write."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert cpp._library.__wrapped__() is not None
    (library,) = tmp_path.glob("kernels-*/kernels.so")
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert cpp._library.__wrapped__() is not None
    assert library.read_bytes() == content


@needs_any
@pytest.mark.usefixtures("one_source")
def test_kernels_that_others_could_have_written_are_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    assert cpp._library.__wrapped__() is not None
    (library,) = tmp_path.glob("cache/kernels-*/kernels.so")
    monkeypatch.setenv("SPECDEC_STRICT", "0")  # as users have it
    library.unlink()  # it is loaded: to shorten it where it stands is a bus error when this process ends
    library.write_bytes(b"loading this would raise an OSError, which is reported")
    (tmp_path / "cache").chmod(0o777)
    assert cpp._library.__wrapped__() is None
    (record,) = caplog.records
    assert re.search(r"cache is writable by others; .* set SPECDEC_CACHE", record.getMessage())


@needs_any
@pytest.mark.usefixtures("one_source")
def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert cpp._library.__wrapped__() is not None
    monkeypatch.setenv("CXX", "false")  # exists, so it would be called
    assert cpp._library.__wrapped__() is not None


@pytest.mark.parametrize(
    ("capability", "spec", "message"),
    [((7, 5), "found", "compute capability of 7.5 must be at least 8.0"), ((9, 0), None, "pip install triton")],
)
def test_a_gpu_without_triton_support_falls_back_to_torch_with_a_warning(
    capability: tuple[int, int],
    spec: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    device = torch.device("cuda")
    with pytest.raises(FallbackError, match=message):
        gpu._triton_supports.__wrapped__(device)
    monkeypatch.setenv("SPECDEC_STRICT", "0")
    assert not gpu._triton_supports.__wrapped__(device)
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels for this GPU are not used, decoding is slower: ")
    assert message in record.getMessage()
