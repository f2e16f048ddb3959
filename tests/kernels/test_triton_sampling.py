"""The sampling kernels for GPUs against torch's operations: on a GPU, or in Triton's interpreter on a CPU.

TRITON_INTERPRET=1 pytest tests/kernels/test_triton_sampling.py
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from helpers.toys import BATCH_MATES, coupled_pieces, processed_distribution
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.conformance.enumeration import coupled_runs, exact_coupled_distribution, exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import joint_distribution, table
from specdec.decoding import Decoder
from specdec.kernels import cpp, gpu
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import confidence
from specdec.proposers.draft_model import DraftModelProposer
from specdec.sampling import randomness
from specdec.sampling.distributions import Dense, Distribution, OneHot, Partial, largest, race
from specdec.sampling.randomness import Role, on_branch
from specdec.sampling.state import RowParams
from specdec.sampling_params import SamplingParams
from specdec.verification import Draft, verify_block, verify_coupled, verify_tokens

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is missing: pip install triton", allow_module_level=True)
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU: TRITON_INTERPRET=1 pytest tests/kernels/test_triton_sampling.py", allow_module_level=True)

from specdec.kernels import triton_sampling as fast

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# 32769: nine chunks, the last with one token; a GPU takes longest to compile, for each size that is 1 or another chunk
SIZES = [1, 3, 61, 32769] if ON_GPU else [1, 2, 3, 31, 61, 1000, 32769]
WIDTHS = [(1, 1), (61, 5), (5000, 16)] if ON_GPU else [(1, 1), (2, 3), (61, 5), (1030, 2), (5000, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALVES = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [2, 0, 0]]).double() / 2
COINS = torch.tensor([[1, 3], [2, 2], [3, 1]]).double() / 4
LARGEST = 1 - 2.0**-53  # the largest uniform there is
# numpy, by which the interpreter computes, warns of what is meant: rows with NaN and infinities
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "for_gpu", lambda tensor: None)
        patch.setattr(cpp, "supports", lambda tensor: False)
        patch.setattr(cpp, "available", lambda dtype: False)
        yield


def by_torch(function: Callable[..., Any], *arguments: Any) -> Any:
    with without_kernels():
        return function(*arguments)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_uniforms(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def at(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched from here on."""
    names: list[str] = []

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            names.append(self.name)
            return self.kernel[grid]

    for name in [name for name in vars(fast) if name.endswith("_kernel")]:
        monkeypatch.setattr(fast, name, Counted(name, getattr(fast, name)))
    return names


# -- uniforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [
        [(3, 1), (200,), (), (1, 200)],
        [(3, 1, 1), (1, 4, 1), (1,), (7,)],
        [(2, 1, 1, 1), (3, 1, 5), (1, 5), ()],
        [(), (), (), ()],
        [(0, 1), (1, 3), (1, 1), (1, 1)],
    ],
)
def test_uniforms_are_those_of_philox_for_all_that_broadcasts(shapes: list[tuple[int, ...]]) -> None:
    numbers = [torch.arange(math.prod(shape), device=DEVICE).view(shape) for shape in shapes]
    seeds = numbers[0] * 0x9E3779B97F4A7C15 - 5  # beyond 63 bits, and so negative
    words = (seeds, numbers[1] * 999_983, on_branch(numbers[2] + Role.ACCEPT, 70_000), numbers[3] * 7_919)
    drawn = randomness.uniforms(*words)
    assert drawn.shape == torch.broadcast_shapes(*shapes)
    assert torch.equal(drawn, by_torch(randomness.uniforms, *words))


def test_uniforms_of_expanded_and_strided_words() -> None:
    words = [(torch.arange(24, device=DEVICE) * 31).view(4, 6).t() for _ in range(2)]
    words += [torch.tensor(int(Role.RECOVER), device=DEVICE).expand(6, 4), words[0][:, 1:2]]
    assert torch.equal(randomness.uniforms(*words), by_torch(randomness.uniforms, *words))


def test_noise_is_one_kernel(launched: list[str]) -> None:
    arguments = (torch.tensor([3, -7], device=DEVICE), torch.tensor([[0, 1, 9], [5, 6, 7]], device=DEVICE), 61)
    noise = randomness.noise(*arguments)
    assert launched == ["_uniforms_kernel"]
    assert torch.equal(noise, by_torch(randomness.noise, *arguments))


# -- the largest ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_largest_logit_and_its_probability(size: int, dtype: torch.dtype) -> None:
    """With ties, of which the first counts, NaN, both infinities, and rows that do not lie next to each other."""
    logits = random(2, 2, size).mul(2).round().to(dtype).transpose(0, 1)
    logits[0, 1, size // 2 :] = logits[0, 1].max()
    logits[1, 0], logits[1, 1, 0] = -torch.inf, -torch.inf if size > 1 else 0
    peaks, places = largest(logits)
    assert peaks.dtype == dtype
    torch.testing.assert_close(peaks, logits.amax(-1), rtol=0, atol=0)
    assert places.tolist() == logits.float().cpu().numpy().argmax(-1).tolist()
    expected = logits.double().softmax(-1).amax(-1).float()
    finite = peaks.isfinite()
    torch.testing.assert_close(confidence(logits.flatten(0, 1)).view(2, 2)[finite], expected[finite], rtol=1e-5, atol=0)
    logits[0, 0, -1], logits[0, 1, -1] = torch.nan, torch.inf
    peaks, places = largest(logits)
    assert peaks[0].isnan().tolist() == [True, False]
    assert peaks[0, 1] == torch.inf
    assert ((places >= 0) & (places < size)).all()


# -- probabilities -------------------------------------------------------------------------------------------


def rows_of(params: list[SamplingParams], vocab_size: int) -> RowParams:
    return RowParams.of(params, vocab_size, DEVICE)


@pytest.mark.parametrize(
    ("size", "dtype"), [*((size, torch.float32) for size in SIZES), (1000, torch.bfloat16), (1000, torch.float16)]
)
def test_softmax_at_each_rows_temperature_with_greedy_rows_between(size: int, dtype: torch.dtype) -> None:
    params = [SamplingParams(temperature=temperature) for temperature in (0.3, 0.0, 1.7)]
    logits = random(3, 2, size).mul(4).to(dtype)
    logits[0, 1, 1::2], logits[1, 1] = -torch.inf, logits[1, 1].max()
    distribution, finite = rows_of(params, size).distribution(logits)
    probs = distribution.dense()
    assert finite.all()
    assert probs.dtype == torch.float32
    for row, temperature in ((0, 0.3), (2, 1.7)):
        expected = (logits[row].double() / temperature).softmax(-1)
        torch.testing.assert_close(probs[row].double(), expected, rtol=2e-5, atol=1e-30)
    assert not probs[0, 1, 1::2].any()
    places = logits[1].float().cpu().numpy().argmax(-1).tolist()
    assert torch.equal(probs[1], OneHot(torch.tensor(places, device=DEVICE), size).dense())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("size", [2, 1000])
def test_rows_without_a_distribution_are_flagged_and_all_nan(size: int, options: dict, temperature: float) -> None:
    logits = random(4, 1, size)
    logits[0, 0, -1], logits[1, 0, 0], logits[2, 0] = torch.nan, torch.inf, -torch.inf
    params = [SamplingParams(temperature=temperature)] * 3 + [SamplingParams(**options)]
    distribution, finite = rows_of(params, size).distribution(logits)
    assert finite.squeeze(1).tolist() == [False, False, False, True]
    probs = distribution.dense()
    assert probs[3].sum().item() == pytest.approx(1)
    assert temperature == 0 or probs[:3].isnan().all()
    drawn = distribution.draw(torch.full((4, 1), LARGEST, dtype=torch.float64, device=DEVICE))
    raced = distribution.draw(random_uniforms(4, 1, size))
    for tokens in (drawn, raced):
        assert ((tokens >= 0) & (tokens < size)).all()  # any token, but a token


def kept_by_top_k(logits: Tensor, k: int) -> Tensor:
    return logits >= logits.sort(-1, descending=True).values[..., min(k, logits.shape[-1]) - 1, None]


def kept_by_top_p(probs: Tensor, top_p: float) -> Tensor:
    """By definition, with sums in float64: a token with less than top_p in more probable ones."""
    ordered, order = probs.double().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    first_of_its_value = torch.searchsorted(-ordered, -ordered)  # ties stand together
    kept = before.gather(-1, first_of_its_value) < torch.tensor(top_p, dtype=torch.float32).double()
    return torch.zeros_like(kept).scatter(-1, order, kept)


@pytest.mark.parametrize(
    ("size", "dtype"), [*((size, torch.float32) for size in SIZES), (1000, torch.bfloat16), (1000, torch.float16)]
)
def test_top_k_keeps_the_k_largest_and_their_ties(size: int, dtype: torch.dtype) -> None:
    """Each row by its own k; ties, -inf, zeros of both signs; a row that keeps all, and one that is greedy."""
    ks = [1, 2, 20, 0]
    logits = random(5, 1, size, seed=size).mul(2 if size < 1000 else 20).to(dtype)
    logits[1] = logits[1].round()
    logits[2, 0, ::2], logits[2, 0, 1::3] = 0.0, -0.0
    logits[0, 0, size // 2 + 1 :] = -torch.inf
    params = [SamplingParams(top_k=k) for k in ks] + [SamplingParams(temperature=0)]
    distribution, finite = rows_of(params, size).distribution(logits)
    assert finite.all()
    for row, k in enumerate(ks):
        kept = kept_by_top_k(logits[row].float(), k or size)
        expected = logits[row].double().masked_fill(~kept, -torch.inf).softmax(-1)
        torch.testing.assert_close(distribution.dense()[row].double(), expected, rtol=2e-5, atol=1e-30)
        assert not distribution.dense()[row][~kept].any()


@pytest.mark.parametrize("size", SIZES)
def test_top_p_keeps_the_fewest_that_reach_it(size: int) -> None:
    top_ps = [0.05, 0.5, 0.95, 0.999999, 1.0] if size < 32769 else [0.95]
    logits = random(len(top_ps), 1, size, seed=size).mul(3)
    distribution, _ = rows_of([SamplingParams(top_p=top_p) for top_p in top_ps], size).distribution(logits)
    probs = rows_of([SamplingParams()] * len(top_ps), size).distribution(logits)[0].dense()
    for row, top_p in enumerate(top_ps):
        kept = kept_by_top_p(probs[row], top_p) if top_p < 1 else torch.ones_like(probs[row], dtype=torch.bool)
        assert torch.equal(distribution.dense()[row] > 0, kept & (probs[row] > 0))
        expected = (probs[row] * kept).double()
        torch.testing.assert_close(distribution.dense()[row].double(), expected / expected.sum(), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([4, 2, 1, 1], 0.5, [1, 0, 0, 0]),  # reached exactly
        ([4, 2, 1, 1], 0.5000001, [1, 1, 0, 0]),
        ([1, 2, 4, 1], 0.75, [0, 1, 1, 0]),
        ([4, 2, 1, 1], 0.75000006, [1, 1, 1, 1]),  # ties with the last included
        ([2, 2, 2, 2], 0.1, [1, 1, 1, 1]),
        ([0, 8, 0, 0], 0.9, [0, 1, 0, 0]),
        ([4, 2, 1, 1], 1e-30, [1, 0, 0, 0]),
    ],
)
def test_top_p_at_its_threshold(weights: list[int], top_p: float, kept: list[int]) -> None:
    """Probabilities that float32 holds exactly: the sum before a token is top_p, or a little less; as by torch."""
    logits = torch.tensor([[weights]], dtype=torch.float32, device=DEVICE).log2() * math.log(2)
    rows = rows_of([SamplingParams(top_p=top_p)], 4)
    probs = rows.distribution(logits)[0].dense()
    assert (probs[0, 0] > 0).tolist() == [bool(each) for each in kept]
    expected = torch.tensor(weights).mul(torch.tensor(kept)).float()
    assert probs[0, 0].tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=1e-6)
    with without_kernels():
        assert torch.equal(rows.distribution(logits)[0].dense() > 0, probs > 0)


@pytest.mark.parametrize("size", [61, 5000] if ON_GPU else [1, 61, 5000])
def test_all_truncations_together_as_by_torch(size: int) -> None:
    """Rows with all, some and none of them; top-k of equal logits decides about many ties."""
    several = [
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"top_k": 3},
        {"temperature": 0.0, "top_k": 2, "top_p": 0.3, "min_p": 0.5},
        {"temperature": 0.6, "top_p": 0.3},
        {"temperature": 1.4, "min_p": 0.3},
        {},
    ]
    logits = random(6, 2, size, seed=size).mul(3)
    logits[0, 1] = logits[0, 1].round()
    rows = rows_of([SamplingParams(**each) for each in several], size)
    probs, expected = rows.distribution(logits)[0].dense(), by_torch(rows.distribution, logits)[0].dense()
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=2e-5, atol=1e-30)


def test_min_p_keeps_a_token_at_its_threshold() -> None:
    logits = torch.tensor([[[1.0, 4, 2, 1]]], device=DEVICE).log2() * math.log(2)
    rows = rows_of([SamplingParams(min_p=0.5)], 4)
    assert (rows.distribution(logits)[0].dense() > 0).tolist() == (
        by_torch(rows.distribution, logits)[0].dense() > 0
    ).tolist()
    assert (rows.distribution(logits)[0].dense() > 0).tolist() == [[[False, True, True, False]]]


def test_logits_of_some_tokens_only() -> None:
    tokens = torch.tensor([1, 4, 5, 9], device=DEVICE)
    for params in ([SamplingParams(top_k=2), SamplingParams(top_p=0.6)], [SamplingParams(temperature=0)] * 2):
        rows, logits = rows_of(params, 10), random(2, 3, 4)
        distribution, expected = rows.distribution(logits, tokens)[0], by_torch(rows.distribution, logits, tokens)[0]
        assert type(distribution) is type(expected)
        torch.testing.assert_close(distribution.dense(), expected.dense())


@pytest.mark.parametrize(("size", "num_rows"), [(61, len(BATCH_MATES)), (1000, 5), (5001, 5)])
def test_a_row_does_not_depend_on_its_batch_mates(size: int, num_rows: int) -> None:
    """Bit for bit, distributions and draws, each row by itself and one position of it by itself."""
    logits, draws = random(num_rows, 6, size, seed=size).mul(2), random_uniforms(num_rows, 6)
    together = rows_of(BATCH_MATES[:num_rows], size).distribution(logits)[0].dense()
    drawn = Dense(together).draw(draws)
    assert (together[:2] / together[:2].sum(-1, keepdim=True) != together[:2]).any(), (
        "normalizing twice would go unnoticed"
    )
    for row in range(num_rows):
        rows = rows_of(BATCH_MATES[row : row + 1], size)
        for here in (slice(1, 2), slice(0, 6))[: 2 if row < 2 else 1]:
            distribution = rows.distribution(logits[row : row + 1, here])[0]
            assert torch.equal(distribution.dense()[0], together[row, here])
            assert torch.equal(distribution.draw(draws[row : row + 1, here])[0], drawn[row, here])
            if isinstance(
                distribution, Dense
            ):  # as a part of what was computed together, wherever that begins in memory
                assert torch.equal(
                    Dense(together[row : row + 1, here]).draw(draws[row : row + 1, here])[0], drawn[row, here]
                )


@pytest.mark.parametrize("size", [61, 1000, 5000])
def test_a_row_does_not_depend_on_the_dtype_that_a_mate_needs(size: int) -> None:
    """A bias or a penalty of one row widens the logits of all to float32."""
    logits = random(2, 2, size).mul(3).bfloat16()
    rows = rows_of([SamplingParams(), SamplingParams(temperature=0.7)], size)
    assert torch.equal(rows.distribution(logits.float())[0].dense(), rows.distribution(logits)[0].dense())


def test_sizes_that_change_with_the_batch_are_not_compiled_in() -> None:
    """Triton compiles another kernel where an argument is 1 or a multiple of 16, unless it is named."""
    script = """
from specdec.kernels import triton_sampling as fast
for name in [name for name in vars(fast) if name.endswith("_kernel")]:
    for param in getattr(fast, name).params:
        if not param.is_constexpr and not param.do_not_specialize:
            print(param.name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    compiled_in = set(done.stdout.split())
    assert {"vocab", "size"} <= compiled_in  # a model's and a draft head's
    strides = {f"{word}_{axis}" for word in ("seed", "position", "role", "origin", "uniform") for axis in range(3)}
    assert not compiled_in & {"per_row", "chunks", "num_drafted", "dim_1", "dim_2", *strides}


# -- draws ---------------------------------------------------------------------------------------------------


def some_probs(num_rows: int, size: int) -> Tensor:
    """Not normalized, mostly zeros."""
    probs = random(num_rows, size).exp() * (random(num_rows, size, seed=7) < -0.4)
    probs[:, size // 3] += 0.01
    return probs


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_the_one_of_the_cumulative_distribution(size: int) -> None:
    num_rows = 8 if size > 1000 else 40
    probs, draws = some_probs(num_rows, size), random_uniforms(num_rows)
    draws[: num_rows // 4], draws[num_rows // 4 : num_rows // 2] = 0, LARGEST
    drawn = Dense(probs).draw(draws)
    assert torch.equal(drawn, by_torch(Dense(probs.double()).draw, draws))
    assert (probs.gather(1, drawn[:, None]) > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_draws_over_a_grid_of_uniforms_are_the_distribution(scale: float) -> None:
    """One midpoint for each unit of weight, over a chunk's end; the scale of the sum does not matter."""
    weights = torch.zeros(5000)
    weights[[0, 3, 1000, 4095, 4096, 4999]] = torch.tensor([1.0, 2, 4, 3, 1, 1])
    midpoints = (torch.arange(12, device=DEVICE).double() + 0.5) / 12
    drawn = Dense((weights * scale).to(DEVICE).expand(12, -1)).draw(midpoints)
    assert torch.bincount(drawn.cpu(), minlength=5000).tolist() == weights.tolist()


def test_a_draw_at_the_edge_between_tokens_is_the_later_one() -> None:
    probs = torch.tensor([0.25, 0.0, 0.25, 0.5], device=DEVICE)
    edges = at(0.0, math.nextafter(0.25, 0), 0.25, math.nextafter(0.5, 0), 0.5, LARGEST)
    assert Dense(probs.expand(6, -1)).draw(edges).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("size", SIZES)
def test_a_race_is_the_one_by_torch(size: int) -> None:
    """Tokens without a probability, many of one probability, and uniforms of 0, next to 0 and the largest below 1."""
    probs, draws = some_probs(6, size).round(decimals=1), random_uniforms(6, size)
    probs[:, size // 2] = 1e-30
    draws[0], draws[1, ::2], draws[2] = 0, LARGEST, 1e-300
    won = race(probs, draws)
    assert torch.equal(won, by_torch(race, probs, draws))
    assert (probs.gather(-1, won.unsqueeze(-1)) > 0).all()


# -- verification --------------------------------------------------------------------------------------------


def distributions(batch: int, width: int, size: int, seed: int) -> Dense:
    logits = random(batch, width, size, seed=seed).mul(3)
    logits[..., 1::3] = -torch.inf
    return Dense(logits.softmax(-1))


def draft_of(form: str, batch: int, width: int, size: int) -> Draft:
    lengths = torch.arange(batch, device=DEVICE) % (width + 1)
    tokens = torch.arange(size, device=DEVICE)[1::2].contiguous()
    distribution: Distribution = distributions(batch, width, size, 5)
    if form == "partial" and len(tokens):
        distribution = Partial(distributions(batch, width, len(tokens), 6), tokens, size)
    drawn = by_torch(distribution.draw, random_uniforms(batch, width, seed=8))
    return Draft(drawn, lengths, OneHot(drawn, size) if form == "one-hot" else distribution)


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@pytest.mark.parametrize("form", ["dense", "one-hot", "partial"])
@pytest.mark.parametrize(("size", "width"), WIDTHS)
def test_fused_verification_decides_as_torch_does(form: str, size: int, width: int, rule: Any) -> None:
    """Ragged drafts that are near the target, so that many are accepted; uniforms of 0 and the largest below 1, too."""
    batch = 3 * (width + 1) if width < 16 else 4
    draft, target = draft_of(form, batch, width, size), distributions(batch, width + 1, size, 5)
    draws = random_uniforms(batch, 2 * width + 1)
    draws[0], draws[1, :width], draws[2], draws[batch // 2 :, :width] = 0, 0, LARGEST, 1e-3
    draws[batch // 2 :, 0] = 0.5
    arguments = (target, draft, draws[:, :width], draws[:, width:])
    outcome, expected = rule(*arguments), by_torch(rule, *arguments)
    assert torch.equal(outcome.accepted, expected.accepted)
    assert torch.equal(outcome.next_token, expected.next_token)


def test_a_residual_without_mass_is_the_target() -> None:
    """Draft and target equal: rejected, which has probability 0, the token is drawn from the target."""
    distribution = distributions(12, 2, 61, 3)
    draft = Draft(
        torch.ones(12, 1, dtype=torch.int64, device=DEVICE),
        torch.ones_like(distribution.probs[:, 0, 0]).long(),
        distribution[:, :1],
    )
    accept, final = torch.full((12, 1), LARGEST, dtype=torch.float64, device=DEVICE), random_uniforms(12, 2)
    outcome = verify_tokens(distribution, draft, accept, final)  # token 1 is impossible, and so never accepted
    assert not outcome.accepted.any()
    assert torch.equal(outcome.next_token, distribution[:, 0].draw(final[:, 0]))


def test_one_hot_targets_and_one_hot_drafts() -> None:
    target = OneHot(torch.tensor([[5, 6, 7]] * 3, device=DEVICE), 9)
    draft = Draft.deterministic(
        torch.tensor([[5, 6], [5, 0], [5, 6]], device=DEVICE), torch.tensor([2, 2, 1], device=DEVICE), 9
    )
    outcome = verify_tokens(target, draft, *(torch.zeros(3, n, dtype=torch.float64, device=DEVICE) for n in (2, 3)))
    assert outcome.accepted.tolist() == [2, 1, 1]
    assert outcome.next_token.tolist() == [7, 6, 6]


def test_float64_distributions_are_left_to_torch(launched: list[str]) -> None:
    target, draft = Dense(distributions(4, 3, 5, 5).probs.double()), draft_of("dense", 4, 2, 5)
    launched.clear()
    verify_tokens(target, draft, random_uniforms(4, 2), random_uniforms(4, 3))
    assert not launched


# -- how many kernels ----------------------------------------------------------------------------------------

VIEWS = {
    "view",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "permute",
    "t",
    "_unsafe_view",
    "alias",
}


class Operations(TorchDispatchMode):
    """Names of the operations that run, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


SOFTMAX = ["_scan_kernel", "_softmax_kernel"]
SEARCH, CUT = ["_search_kernel"] * 8 + ["_floor_kernel"], ["_kept_kernel", "_normalize_kernel"]


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, torch.float32, SOFTMAX),
        ({"top_k": 5}, torch.float32, SEARCH + SOFTMAX),
        ({"top_k": 5}, torch.bfloat16, SEARCH[-5:] + SOFTMAX),
        ({"top_p": 0.9}, torch.bfloat16, SOFTMAX + SEARCH + CUT),
        ({"min_p": 0.1}, torch.float32, SOFTMAX + CUT),
    ],
)
def test_kernels_per_distribution(options: dict, dtype: torch.dtype, expected: list[str], launched: list[str]) -> None:
    """Whatever the batch and the number of positions."""
    rows, logits = rows_of([SamplingParams(**options)] * 2, 50), random(2, 3, 50).to(dtype)
    with Operations() as operations:
        rows.distribution(logits)
    assert launched == expected
    assert operations.names == ["probabilities"]


@pytest.mark.parametrize("form", ["dense", "one-hot", "partial"])
def test_token_verification_is_three_kernels(form: str, launched: list[str]) -> None:
    draft, target = draft_of(form, 4, 3, 50), distributions(4, 4, 50, 5)
    draws = random_uniforms(4, 7)
    launched.clear()
    with Operations() as operations:
        verify_tokens(target, draft, draws[:, :3], draws[:, 3:])
    assert launched == ["_accept_kernel", "_last_masses_kernel", "_last_draw_kernel"]
    assert operations.names == ["num_accepted", "final_token"]


# -- the operators, and exact distributions through the loop ---------------------------------------------------


def test_operators_pass_opcheck() -> None:
    """Their schemas, and the shapes and dtypes that fake tensors get."""
    words = [torch.arange(3, device=DEVICE)] * 4
    rows, logits = (
        rows_of([SamplingParams(top_k=2, top_p=0.5, min_p=0.1), SamplingParams(temperature=0)], 9),
        random(2, 3, 9),
    )
    truncation = (rows.greedy, rows.top_k, rows.keeps_all, rows.top_p, rows.min_p)
    draft, target, draws = draft_of("partial", 2, 2, 9), distributions(2, 3, 9, 5), random_uniforms(2, 3)
    form = [draft.distribution.inner.probs, draft.distribution.tokens]
    calls = [
        (fast.uniforms, words),
        (fast.summaries, [logits]),
        (fast.probabilities, [logits, rows.temperature, *truncation]),
        (fast.probabilities, [logits, rows.temperature, None, None, None, None, None]),
        (fast.draw, [target.probs, draws]),
        (fast.race, [target.probs, random_uniforms(2, 3, 9)]),
        (fast.num_accepted, [[target.probs, None], form, draft.tokens, draft.num_proposed, draws[:, :2]]),
        (fast.final_token, [target.probs, form, draft.num_proposed, draft.num_proposed, draws, None]),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


class Single(MarkovModel):
    """A Markov table whose logits are float32, as those of models are, and so go through the kernels."""

    def forward_at(self, *arguments: Any, **named: Any) -> Tensor:
        return super().forward_at(*arguments, **named).float()


def single_pair(seed: int, rows: Tensor) -> tuple[Single, Single]:
    """(target, draft), each context with one of the given distributions."""
    target, draft = (Single(table(seed + each, rows).to(DEVICE)) for each in range(2))
    return target, draft


def decoder_of(
    target: Single, draft: Single | None, gamma: int, source: Any, rule: Any, max_batch_size: int
) -> Decoder:
    def moved(*words: Tensor) -> Tensor:
        return source(*(word.cpu() for word in words)).to(DEVICE)

    proposer = draft and DraftModelProposer(draft, moved)
    options = {"max_batch_size": max_batch_size, "rule": rule, "uniforms": moved, "records": False}
    return Decoder(target, proposer, gamma if draft else 0, **options)


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
def test_joint_distribution_through_the_kernels(rule: Any, launched: list[str]) -> None:
    """Exactly, for all uniforms: three tokens, rejections and full acceptance among them."""
    target, draft = single_pair(1, HALVES)
    distribution = exact_distribution(partial(decoder_of, target, draft, 1), (1, 2), 3, (2, 2, 2), rule=rule)
    assert distance(distribution, joint_distribution(target, (1, 2), 3)) < 1e-12
    assert {"_scan_kernel", "_softmax_kernel", "_draw_kernel", "_last_draw_kernel"} <= set(launched)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.6}])
def test_joint_distribution_of_truncated_rows_through_the_kernels(options: dict, launched: list[str]) -> None:
    """Of each coin the likelier side is kept, or both where they tie."""
    target, draft = single_pair(7, COINS)
    params = SamplingParams(**options)
    distribution = exact_distribution(partial(decoder_of, target, draft, 1), (1, 0), 3, (2, 2, 2), params)
    assert distance(distribution, processed_distribution(target, params, (1, 0), 3)) < 1e-12
    assert {"_search_kernel", "_kept_kernel"} & set(launched)


def test_joint_distribution_of_the_coupled_loop_through_the_kernels(launched: list[str]) -> None:
    target, draft = single_pair(12, COINS)
    pieces = coupled_pieces((target, draft), (1, 0), 3)
    runs = coupled_runs(partial(decoder_of, target, draft, 1), (1, 0), pieces, rule=verify_coupled)
    assert distance(exact_coupled_distribution(runs), joint_distribution(target, (1, 0), 3)) < 1e-12
    assert "_race_kernel" in launched
