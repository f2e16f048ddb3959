"""Kernels for CPUs against torch, and what happens where there are none."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch

from specdec import kernels
from specdec.models.fusion import Norm, Projection

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if kernels.available(dtype)]


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


@pytest.mark.parametrize(
    ("compiler", "message"), [("no-such-compiler", "no C\\+\\+ compiler was found"), ("false", "false failed")]
)
def test_without_a_working_compiler_it_is_said_and_torch_is_used(
    compiler: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert kernels._library.__wrapped__() is None
    (record,) = caplog.records
    assert record.getMessage().startswith("kernels for this CPU are not used, decoding is slower: ")
    assert re.search(message, record.getMessage())


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not DTYPES:
        pytest.skip("this machine has no kernels: they need Linux, a C++ compiler and AVX-512")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert kernels._library.__wrapped__() is not None
    monkeypatch.setenv("CXX", "false")  # exists, so it would be called
    assert kernels._library.__wrapped__() is not None
