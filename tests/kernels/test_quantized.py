"""Products with quantized weights against a slow, obvious implementation, bit by bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from specdec.kernels import cpp
from specdec.kernels.quantized import GROUP, KINDS, Quantized, pack
from specdec.models.fusion import Projection, QuantizedLinear

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if cpp.available(dtype)]
needs_kernels = pytest.mark.skipif(not DTYPES, reason="kernels need Linux, a C++ compiler and AVX-512")
WIDTHS = (*range(1, 17), 24, 25, 32)


def weights(kind: str, outputs: int, inputs: int) -> Quantized:
    """Random codes and scales, all values of both."""
    generator = torch.Generator().manual_seed(outputs + inputs)

    def integers(low: int, high: int, columns: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, (outputs, columns), generator=generator).to(dtype)

    def halves(columns: int) -> Tensor:
        return torch.randn(outputs, columns, generator=generator).mul(0.01).half()

    bits = 8 if kind == "Q8_0" else int(kind[1])
    codes, groups = integers(0, 1 << bits, inputs), inputs // GROUP
    if not kind.endswith("K"):
        return Quantized(kind, codes, tuple(halves(groups) for _ in range(1 + kind.endswith("1"))))
    if kind == "Q6_K":
        return Quantized(
            kind, codes, tuple(integers(-128, 128, groups, torch.int8) for _ in range(2)), (halves(groups // 8),)
        )
    return Quantized(
        kind, codes, tuple(integers(0, 64, groups) for _ in range(2)), (halves(groups // 8), halves(groups // 8))
    )


def fixed_point(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Inputs float32 [tokens, groups, 32] as integers times a power of two of each group, in float64."""
    largest = x.abs().amax(-1, keepdim=True).double().numpy()
    # the largest is below 2 ** exponent; its integer fits in 15 bits and is at most 32512
    exponent = np.frexp(np.maximum(largest, 2.0**-100))[1]
    exponent = exponent + (largest / 2.0 ** (exponent - 15) > 32512)
    scale = 2.0 ** (exponent - 15.0)
    return np.rint(x.double().numpy() / scale), scale


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of float32, rounded once: the product is exact in float64."""
    return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)


def expected(quantized: Quantized, x: Tensor) -> np.ndarray:
    """Products float32 [tokens, out]: the exact sum of each group, then one group after the other in float32."""
    kind, (outputs, inputs) = KINDS[quantized.kind], quantized.codes.shape
    values, scales = fixed_point(x.view(len(x), -1, GROUP))
    codes = quantized.codes.numpy().astype(np.float64).reshape(outputs, -1, GROUP) - kind.zero
    first, second = (each.float().numpy() for each in (*quantized.scales, torch.zeros(outputs, inputs // GROUP))[:2])
    if quantized.of_supers:
        of_supers = [each.float().numpy().repeat(8, 1) for each in quantized.of_supers]
        first, second = first * of_supers[0], second * (of_supers[0] if quantized.kind == "Q6_K" else -of_supers[1])
    sums = np.zeros((len(x), outputs), np.float32)
    for group in range(inputs // GROUP):
        scale = scales[:, group].astype(np.float32)

        def product(part: slice, group: int = group, scale: np.ndarray = scale) -> np.ndarray:
            return (values[:, group, part] @ codes[:, group, part].T).astype(np.float32) * scale

        total = values[:, group].sum(-1, keepdims=True).astype(np.float32) * scale
        if quantized.kind == "Q6_K":
            sums = fma(product(slice(16)), first[:, group], sums)
            sums = fma(product(slice(16, None)), second[:, group], sums)
        else:
            sums = fma(product(slice(None)), first[:, group], sums)
            sums = fma(total, second[:, group], sums)
    return sums


def activations(tokens: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, some groups zero, and one just above the largest that 15 bits hold."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, inputs, generator=generator)
    x *= torch.exp(4 * torch.randn(tokens, inputs // GROUP, generator=generator)).repeat_interleave(GROUP, 1)
    x[:, :GROUP] *= torch.rand(tokens, 1, generator=generator) < 0.5
    x[0, 5], x[-1, -1] = 8.0, -7.9999
    return x.to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_bit_identical_to_the_obvious_ones_at_all_widths(kind: str, dtype: torch.dtype) -> None:
    multiple = KINDS[kind].inputs
    for outputs, inputs in ((1, multiple), (33, 2 * multiple), (96, 3 * multiple)):
        quantized = weights(kind, outputs, inputs)
        projection = Projection(QuantizedLinear(nn.Linear(inputs, outputs, bias=False, dtype=dtype), pack(quantized)))
        assert projection.kernel is not None
        assert projection.kernel.num_parts == 1
        for width in WIDTHS:
            x = activations(width, inputs, dtype)
            wanted = torch.from_numpy(expected(quantized, x.float())).to(dtype)
            assert torch.equal(projection(x), wanted), (outputs, inputs, width)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_different_kinds_are_one_projection(dtype: torch.dtype) -> None:
    """As the queries, keys and values of files in Q4_K_M; with a bias."""
    torch.manual_seed(0)
    linears = [
        QuantizedLinear(nn.Linear(256, outputs, dtype=dtype), pack(weights(kind, outputs, 256)))
        for kind, outputs in (("Q4_K", 64), ("Q8_0", 32), ("Q6_K", 40))
    ]
    x, joined = torch.randn(5, 256).to(dtype), Projection(*linears)
    assert joined.kernel is not None
    assert joined.kernel.num_parts == 3
    assert torch.equal(joined(x), torch.cat([Projection(linear)(x) for linear in linears], -1))


@needs_kernels
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_makes_the_sums_nan(value: float) -> None:
    quantized, x = weights("Q4_1", 32, 64), torch.randn(3, 64)
    x[1, 40] = value
    projection = Projection(QuantizedLinear(nn.Linear(64, 32, bias=False), pack(quantized)))
    assert projection(x).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.skipif(not cpp.multiplies_quantized(), reason="needs Linux and a C++ compiler")
def test_a_dtype_without_kernels_for_layers_has_the_same_products() -> None:
    quantized, x = weights("Q4_1", 40, 64), activations(7, 64, torch.float16)
    projection = Projection(QuantizedLinear(nn.Linear(64, 40, dtype=torch.float16), pack(quantized)))
    assert projection.kernel is None
    products = torch.from_numpy(expected(quantized, x.float()))
    assert torch.equal(projection(x), (products + projection.bias).half())


@pytest.fixture(scope="module")
def other_libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    """The kernels as they are compiled for CPUs without AVX-512: only the products with quantized weights."""
    if not cpp.multiplies_quantized():
        pytest.skip("needs Linux and a C++ compiler")
    libraries = {}
    for capability in ("AVX2", "DEFAULT") if torch.cpu._is_avx2_supported() else ("DEFAULT",):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpp, "_supported_dtypes", lambda: ())
            patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
            patch.setenv("SPECDEC_CACHE", str(tmp_path_factory.mktemp("cache")))
            assert cpp._instructions() == (cpp._AVX2 if capability == "AVX2" else ())
            libraries[capability] = cpp._library.__wrapped__()
    return libraries


def test_other_cpus_have_only_products(other_libraries: dict[str, ctypes.CDLL]) -> None:
    for library in other_libraries.values():
        assert hasattr(library, "quantized_products")
        assert not hasattr(library, "softmax_float32")


@pytest.mark.parametrize("kind", KINDS)
def test_other_cpus_have_the_same_bits(
    kind: str, other_libraries: dict[str, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = 2 * KINDS[kind].inputs
    quantized = weights(kind, 40, inputs)
    packed = pack(quantized)
    monkeypatch.setattr(cpp, "_function", cpp._function.__wrapped__)
    for library in other_libraries.values():
        monkeypatch.setattr(cpp, "_library", lambda library=library: library)
        for width in (1, 5, 13, 32):
            x = activations(width, inputs, torch.float32)
            assert torch.equal(cpp.quantized_products([packed], x), torch.from_numpy(expected(quantized, x)))
