"""From logits to distributions: every processor against a slow, obvious version; invalid parameters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import distribution_rows
from helpers.toys import BATCH_MATES, Automaton, obvious_distribution
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec.constraints.progress import Progress
from specdec.kernels import cpp
from specdec.sampling.distributions import Dense, OneHot, Partial, as_int64, largest, stack_distributions
from specdec.sampling.state import RowParams, SamplingState
from specdec.sampling_params import SamplingParams

VOCAB = 6
HALVES = [math.log(4), math.log(2), 0.0, 0.0]  # 1/2, 1/4, 1/8, 1/8, exactly
CPU = torch.device("cpu")
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 4, 6, 99]),
    top_p=st.sampled_from([0.3, 0.75, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-math.inf, -1.0, 2.0]), max_size=2),
)
tokens_strategy = st.lists(st.integers(0, VOCAB - 1), max_size=5)


@given(
    st.lists(st.tuples(params_strategy, tokens_strategy, tokens_strategy), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_every_processor_equals_its_definition_in_every_row(rows: list, seed: int) -> None:
    """Also: rows do not influence each other, greedy rows among sampled ones included."""
    logits = torch.randn(len(rows), 1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    params, prompts, outputs = zip(*rows, strict=True)
    distribution = SamplingState(params, prompts, outputs, VOCAB, CPU).distribution(logits)[0].dense()
    for row in range(len(rows)):
        expected = obvious_distribution(logits[row, 0].tolist(), params[row], prompts[row], outputs[row])
        assert distribution[row, 0].tolist() == pytest.approx(expected, abs=1e-6)


@given(
    params_strategy,
    tokens_strategy,
    tokens_strategy,
    st.lists(st.integers(0, VOCAB - 1), max_size=4),
    st.integers(0, 2**32 - 1),
)
def test_drafted_positions_have_their_own_penalties(
    params: SamplingParams, prompt: list, output: list, drafted: list, seed: int
) -> None:
    """Position i of a draft has exactly the distribution of plain decoding after its first i tokens."""
    logits = torch.randn(1, len(drafted) + 1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = SamplingState([params], [prompt], [output], VOCAB, CPU)
    together = state.distribution(logits, torch.tensor([drafted], dtype=torch.int64))[0].dense()
    for i in range(len(drafted) + 1):
        plain = SamplingState([params], [prompt], [output + drafted[:i]], VOCAB, CPU)
        assert torch.equal(together[:, i], plain.distribution(logits[:, i : i + 1])[0].dense()[:, 0])
        one = state.distribution(logits[:, i : i + 1], torch.tensor([drafted[:i]], dtype=torch.int64))[0].dense()
        assert torch.equal(together[:, i], one[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("processor", "kept"),
    [
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.5 + 2**-20}, 2),
        ({"top_p": 0.75}, 2),
        ({"top_p": 0.75 + 2**-20}, 4),
        ({"top_p": 0.875}, 4),  # ties with the last are kept
        ({"top_k": 3}, 4),
        ({"top_k": 2}, 2),
        ({"min_p": 0.5}, 2),
        ({"min_p": 0.5 + 2**-20}, 1),
        ({"min_p": 0.25}, 4),
    ],
    ids=str,
)
def test_ties_at_a_threshold_are_kept(processor: dict, kept: int, dtype: torch.dtype) -> None:
    """A mass equal to top_p suffices; a probability equal to the min_p threshold or tied with the top_k-th is kept.

    Also in a large vocabulary whose other tokens have probability 0.
    """
    for num_others in (0, 1000):
        logits = torch.tensor([[[*HALVES, *[-math.inf] * num_others]]], dtype=dtype)
        state = SamplingState([SamplingParams()], [[]], [[]], logits.shape[-1], CPU)
        plain = state.distribution(logits)[0].dense()[0, 0]
        assert plain[:4].tolist() == [0.5, 0.25, 0.125, 0.125], "the case is not exact"
        distribution = (
            SamplingState([SamplingParams(**processor)], [[]], [[]], logits.shape[-1], CPU)
            .distribution(logits)[0]
            .dense()[0, 0]
        )
        assert distribution.nonzero().flatten().tolist() == list(range(kept))
        assert distribution[:kept].tolist() == pytest.approx((plain[:kept] / plain[:kept].sum()).tolist(), abs=1e-7)


@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("top_p", [0.05, 0.9])
def test_nucleus_of_a_large_vocabulary(spread: float, top_p: float) -> None:
    """The nucleus is the fewest tokens that reach top_p, whether or not it fits in the entries sorted first."""
    logits = spread * torch.randn(1, 1, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probs = logits.softmax(-1)[0, 0]
    distribution = (
        SamplingState([SamplingParams(top_p=top_p)], [[]], [[]], 3000, CPU).distribution(logits)[0].dense()[0, 0]
    )
    kept = distribution > 0
    assert probs[kept].sum() >= top_p - 1e-12
    assert probs[kept].sum() - probs[kept].min() < top_p or spread == 0  # with spread 0 all are tied
    assert spread == 0 or probs[kept].min() > probs[~kept].max()
    assert distribution[kept].tolist() == pytest.approx((probs[kept] / probs[kept].sum()).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_an_untruncated_row_is_bit_identical_with_any_batch_mates(options: dict, dtype: torch.dtype) -> None:
    """An untruncated, a truncated and a greedy row, together and each alone."""
    params = [SamplingParams(), SamplingParams(**options), SamplingParams(temperature=0)]
    logits = torch.randn(3, 2, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    together = SamplingState(params, [[]] * 3, [[]] * 3, 1000, CPU).distribution(logits)[0].dense()
    for row in range(3):
        alone = (
            SamplingState(params[row : row + 1], [[]], [[]], 1000, CPU).distribution(logits[row : row + 1])[0].dense()
        )
        assert torch.equal(alone[0].to(dtype), together[row])


@pytest.fixture(params=[False, True], ids=["torch", "kernels"])
def _with_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with torch operations and with the CPU kernels."""
    if not request.param:
        monkeypatch.setattr(cpp, "available", lambda dtype: False)
    elif not cpp.available(torch.float32):
        pytest.skip("kernels need Linux, a C++ compiler and AVX-512")


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_and_races_equal_their_definitions(dtype: torch.dtype) -> None:
    """Of several positions in several rows, with impossible tokens and noise of 0."""
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(4, 3, 5, generator=generator, dtype=torch.float64).mul(torch.tensor([0, 1, 1, 0, 1])).to(dtype)
    probs /= probs.sum(-1, keepdim=True)
    uniforms = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    noise = torch.rand(4, 3, 5, generator=generator, dtype=torch.float64)
    noise[1, :, 0] = noise[2, :, 2] = uniforms[0] = 0
    drawn, won = Dense(probs).draw(uniforms), Dense(probs).draw(noise)
    assert drawn.shape == won.shape == (4, 3)
    for row, position in itertools.product(range(4), range(3)):
        own = probs[row, position].double().tolist()
        edges = list(itertools.accumulate(own))
        threshold = uniforms[row, position].item() * edges[-1]
        assert drawn[row, position] == next(token for token, edge in enumerate(edges) if edge > threshold)
        waits = [
            -math.log1p(-u) / p if p else math.inf for p, u in zip(own, noise[row, position].tolist(), strict=True)
        ]
        assert won[row, position] == waits.index(min(waits))


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize(("vocab_size", "seed"), [(61, 0), (61, 1), (5000, 2), (5000, 3), (50_257, 4)])
def test_a_row_does_not_depend_on_its_batch_mates(vocab_size: int, seed: int) -> None:
    """Bit-identical alone, in pairs and all together; torch splits sums over the last vocabulary across threads."""
    logits = torch.randn(len(BATCH_MATES), 8, vocab_size, generator=torch.Generator().manual_seed(seed)).mul(2)

    def distribution(*rows: int) -> Tensor:
        params = [BATCH_MATES[row] for row in rows]
        return (
            SamplingState(params, [[]] * len(rows), [[]] * len(rows), vocab_size, CPU)
            .distribution(logits[[*rows]])[0]
            .dense()
        )

    together = distribution(*range(len(BATCH_MATES)))
    renormalized = together[:2] / together[:2].sum(-1, keepdim=True)
    assert (renormalized != together[:2]).any(), "normalizing twice would go unnoticed"
    for row in range(len(BATCH_MATES)):
        assert torch.equal(distribution(row)[0], together[row])
        for mate in range(len(BATCH_MATES)) if vocab_size == 61 else ():
            assert torch.equal(distribution(row, mate)[0], together[row])
    params = [BATCH_MATES[4]]
    one = SamplingState(params, [[]], [[]], vocab_size, CPU).distribution(logits[4:5, 3:4])[0].dense()
    assert torch.equal(one[0, 0], together[4, 3])  # a single sum


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "mate", [{"logit_bias": {3: 2.0}}, {"repetition_penalty": 1.3, "frequency_penalty": 0.2}], ids=str
)
def test_a_row_does_not_depend_on_a_batch_mate_with_modified_logits(mate: dict, dtype: torch.dtype) -> None:
    """The batch mate makes the logits float32; the row's own values stay the same."""
    logits = torch.randn(1, 3, 1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = SamplingState([SamplingParams()], [[3]], [[5]], 1000, CPU)
    beside = SamplingState([SamplingParams(), SamplingParams(**mate)], [[3]] * 2, [[5]] * 2, 1000, CPU)
    drafted = torch.tensor([[7, 8]])
    expected = alone.distribution(logits, drafted)[0].dense()
    distribution = beside.distribution(logits.expand(2, -1, -1), drafted.expand(2, -1))[0].dense()
    assert torch.equal(distribution[0], expected[0])
    assert not torch.equal(distribution[1], expected[0])


def test_a_nucleus_that_just_fits_does_not_depend_on_a_batch_mate_that_needs_a_sort() -> None:
    """top_p is exactly the sum of the 256 largest entries, added in order or by `torch.sum`."""
    for seed in range(20):
        logits = torch.randn(1, 1, 2000, generator=torch.Generator().manual_seed(seed))
        highest = logits.softmax(-1).topk(256).values
        for reached in (highest.cumsum(-1)[0, 0, -1], highest.sum()):
            params = [SamplingParams(top_p=float(reached)), SamplingParams(top_p=0.999)]
            alone, beside = (
                SamplingState(rows, [[]] * len(rows), [[]] * len(rows), 2000, CPU).distribution(
                    logits.expand(len(rows), -1, -1)
                )[0]
                for rows in (params[:1], params)
            )
            assert torch.equal(alone.dense()[0], beside.dense()[0])


def test_observed_tokens_count_like_initial_outputs() -> None:
    params = SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2)
    logits = torch.randn(2, 1, VOCAB, dtype=torch.float64)
    initial, observed = (
        SamplingState([params] * 2, [[0], [1]], outputs, VOCAB, CPU) for outputs in ([[2, 2], [3]], [[], []])
    )
    observed.observe(0, [2, 2])
    observed.observe(1, [3])
    assert torch.equal(initial.distribution(logits)[0].dense(), observed.distribution(logits)[0].dense())


def test_greedy_builds_no_probabilities_and_breaks_ties_by_lowest_id() -> None:
    distribution = SamplingState([SamplingParams(temperature=0)], [[]], [[]], 4, CPU).distribution(
        torch.tensor([[[1.0, 3, 3, 0]]])
    )[0]
    assert isinstance(distribution, OneHot)
    assert distribution.tokens.tolist() == [[1]]


def test_bf16_logits_become_a_float32_distribution() -> None:
    distribution = SamplingState([SamplingParams()], [[]], [[]], 4, CPU).distribution(torch.randn(1, 1, 4).bfloat16())[
        0
    ]
    assert isinstance(distribution, Dense)
    assert distribution.probs.dtype == torch.float32


@pytest.mark.parametrize("row", [[math.nan, 0.0], [-math.inf, -math.inf], [math.inf, 0.0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_invalid_logits_are_located(row: list[float], temperature: float) -> None:
    logits = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 1.0], row]])
    params = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p) for top_k, top_p in ((0, 1), (1, 0.5))]
    state = SamplingState(params, [[]] * 2, [[]] * 2, 2, CPU)
    distribution, finite = state.distribution(logits, torch.zeros(2, 1, dtype=torch.int64))
    assert finite.tolist() == [[True, True], [True, False]]
    uniforms = torch.full((2, 2), 0.999, dtype=torch.float64)
    for each in (distribution, Dense(distribution.dense().double())):
        drawn = each.draw(uniforms)
        assert ((drawn >= 0) & (drawn < 2)).all()  # arbitrary, but a valid token id


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("temperature", -0.1, "finite and >= 0; 0 is greedy"),
        ("temperature", math.nan, "finite and >= 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_p", 1.5, r"in \(0, 1\]"),
        ("top_p", math.nan, r"in \(0, 1\]"),
        ("top_k", -1, "integer >= 0"),
        ("min_p", 1.1, r"in \[0, 1\]"),
        ("presence_penalty", math.inf, "finite"),
        ("frequency_penalty", math.nan, "finite"),
        ("repetition_penalty", 0.0, "> 0"),
        ("max_tokens", 0, "integer >= 1"),
        ("seed", -1, r"in \[0, 2\*\*64\)"),
        ("seed", 2**64, r"in \[0, 2\*\*64\)"),
        ("logit_bias", {-1: 0.0}, "token ids"),
        ("logit_bias", {1: math.inf}, "below"),
        ("logit_bias", {1: math.nan}, "below"),
        ("stop_token_ids", (-5,), ">= 0"),
    ],
)
def test_invalid_parameters_are_named(field: str, value: object, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=.* must be .*{rule}"):
        SamplingParams(**{field: value})


def _distribution(probs: list[float]) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64)


def test_distributions_index_like_tensors() -> None:
    dense = Dense(_distribution([[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.25, 0.75]]]))
    one_hot = OneHot(torch.tensor([[0, 1], [1, 1]]), 2)
    columns = torch.tensor([1, 0])
    assert dense.at(columns).probs.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert one_hot.at(columns).tokens.tolist() == [1, 1]
    assert dense[:, :1].shape == one_hot[:, :1].shape == (2, 1)
    assert one_hot.prob(torch.tensor([[0, 0], [1, 0]])).tolist() == [[1, 0], [1, 0]]
    assert OneHot(torch.tensor([1, 1, 1]), 3).prob(torch.tensor([0, 1, 2])).tolist() == [0, 1, 0]


@given(distribution_rows(6, 3), distribution_rows(6, 7), st.sampled_from([(0, 2, 5), (1, 2, 6), (3, 4, 5)]))
def test_a_partial_distribution_equals_the_dense_one_padded_with_zeros(
    inner: Tensor, other: Tensor, some: tuple[int, ...]
) -> None:
    """For every token, inside or outside the subset: probability, excess, draws and both ways of indexing."""
    vocabulary = torch.tensor(some)
    partial = Partial(Dense(inner.view(2, 3, 3)), vocabulary, 7)
    expected = torch.zeros(2, 3, 7, dtype=torch.float64)
    expected[..., vocabulary] = inner.view(2, 3, 3)
    dense, other = Dense(expected), other.view(2, 3, 7)
    assert torch.equal(partial.dense(), expected)
    for token in range(7):
        tokens = torch.full((2, 3), token)
        assert torch.equal(partial.prob(tokens), dense.prob(tokens))
    assert torch.equal(partial.excess(other), dense.excess(other))
    columns = torch.tensor([2, 0])
    assert torch.equal(partial.at(columns).dense(), expected[[0, 1], [2, 0]])
    assert torch.equal(dense.at(columns).dense(), expected[[0, 1], [2, 0]])
    stacked = stack_distributions([partial[:, i] for i in range(3)])
    assert isinstance(stacked, Partial)
    assert torch.equal(stacked.dense(), expected)
    for uniform in (0.0, 0.3, 0.999):
        uniforms = torch.full((2, 3), uniform, dtype=torch.float64)
        assert torch.equal(partial.draw(uniforms), dense.draw(uniforms))
    noise = torch.linspace(0.1, 0.9, 42, dtype=torch.float64).view(2, 3, 7)
    assert torch.equal(partial.draw(noise), dense.draw(noise))


def test_excess_over_a_one_hot_distribution() -> None:
    probs, tokens = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.0, 0.75]]]), torch.tensor([[1, 0]])
    assert torch.equal(OneHot(tokens, 3).excess(probs), Dense(OneHot(tokens, 3).dense()).excess(probs))


@pytest.mark.parametrize("num_positions", [1, 3])
def test_positions_are_stacked_as_columns(num_positions: int) -> None:
    """Sparse if all positions are; a one-hot among dense ones becomes dense."""
    tokens = torch.tensor([[0, 1, 2], [2, 2, 1]])[:, :num_positions]
    columns = [OneHot(tokens[:, i], 3) for i in range(num_positions)]
    stacked = stack_distributions(columns)
    assert isinstance(stacked, OneHot)
    assert torch.equal(stacked.tokens, tokens)
    for first in (columns[0], Dense(columns[0].dense()), Partial(Dense(columns[0].dense()), torch.arange(3), 3)):
        mixed = stack_distributions([first, Dense(columns[-1].dense())])
        assert isinstance(mixed, Dense)
        assert torch.equal(mixed.dense(), OneHot(tokens[:, [0, -1]], 3).dense())
    one, other = (Partial(Dense(columns[0].dense()), torch.tensor(names), 5) for names in ([0, 1, 2], [1, 2, 4]))
    mixed = stack_distributions([one, other])
    assert isinstance(mixed, Dense)
    assert torch.equal(mixed.dense(), torch.stack([one.dense(), other.dense()], 1))


def test_draws_are_neither_coupled_nor_greedy_by_default() -> None:
    for rows in (RowParams.of([SamplingParams()], 4, CPU), SamplingState([SamplingParams()], [[]], [[]], 4, CPU).rows):
        assert (rows.coupled, rows.greedy_drafts) == (False, False)


def test_a_biased_draft_vocabulary_gives_other_tokens_no_probability() -> None:
    state = SamplingState([SamplingParams(logit_bias={4: math.log(2)}, seed=7)], [[]], [[]], 6, CPU)
    probs = state.distribution(torch.zeros(1, 1, 2), tokens=torch.tensor([1, 4]))[0].dense()[0, 0]
    assert probs.tolist() == pytest.approx([0, 1 / 3, 0, 0, 2 / 3, 0])
    assert state.seeds.tolist() == [7]


def test_a_nucleus_is_of_its_own_row() -> None:
    """After ten rows that keep all."""
    params = [*[SamplingParams()] * 10, SamplingParams(top_p=0.75)]
    state = SamplingState(params, [[]] * 11, [[]] * 11, 4, CPU)
    distribution = state.distribution(torch.tensor([[HALVES]] * 11, dtype=torch.float64))[0].dense()
    assert distribution[-1, 0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])


def test_greedy_drafts_take_the_most_probable_token_and_their_target_is_sampled() -> None:
    state, logits = SamplingState([SamplingParams()], [[]], [[]], 3, CPU, greedy_drafts=True), torch.rand(1, 1, 3)
    for source in (state, state.rows):
        assert isinstance(source.distribution(logits)[0], Dense)
        drafted = source.distribution(logits, of_draft=True)[0]
        assert isinstance(drafted, OneHot)
        assert torch.equal(drafted.tokens, logits.argmax(-1))


@pytest.mark.usefixtures("_with_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_greedy_row_beside_a_sampled_one_is_valid(dtype: torch.dtype) -> None:
    params, logits = [SamplingParams(temperature=0), SamplingParams()], torch.tensor([[[0.0, 5.0, 1.0]]] * 2).to(dtype)
    distribution, finite = SamplingState(params, [[]] * 2, [[]] * 2, 3, CPU).distribution(logits)
    assert finite.tolist() == [[True], [True]]
    assert distribution.dense()[0].tolist() == [[0, 1, 0]]


def test_a_constraint_leaves_the_tokens_that_it_allows() -> None:
    """After each draft token its own; a row without a constraint keeps all."""
    constraint = Automaton([{0: 1, 2: 0}, {1: 0}])
    constrained = [Progress(constraint), None, None, None]
    state = SamplingState([SamplingParams()] * 4, [[]] * 4, [[]] * 4, 3, CPU, constrained=constrained)
    distribution = state.distribution(torch.zeros(4, 2, 3), torch.zeros(4, 1, dtype=torch.int64))[0].dense()
    assert distribution[0].tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    assert distribution[1:].flatten().tolist() == pytest.approx([1 / 3] * 18)


@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_a_draft_vocabulary_may_be_smaller_than_top_k(top_k: int) -> None:
    logits, tokens = torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([1, 4, 9])
    state = SamplingState([SamplingParams(top_k=top_k)], [[]], [[]], 10, CPU)
    probs = state.distribution(logits, tokens=tokens)[0].dense()[0, 0]
    kept = logits[0, 0, :top_k].softmax(-1)
    assert probs[tokens][:top_k].tolist() == pytest.approx(kept.tolist())
    assert (probs > 0).sum() == len(kept)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_positions", [1, 2])
def test_the_largest_logit_and_its_first_index(num_positions: int, dtype: torch.dtype) -> None:
    """By kernels or by the portable code, whichever the dtype takes; ties go to the first, and NaN wins."""
    rows = torch.tensor([[[-3.0, -1.0, -1.0], [2.0, 0.5, 1.0]], [[0.0, math.nan, 5.0], [-math.inf, -4.0, 7.0]]])
    peaks, places = largest(rows[:, :num_positions].to(dtype))
    expected = torch.tensor([[-1.0, 2.0], [math.nan, 7.0]])[:, :num_positions]
    assert torch.equal(peaks.double().nan_to_num(99.0), expected.double().nan_to_num(99.0))
    valid = ~expected.isnan()
    assert places[valid].tolist() == torch.tensor([[1, 0], [1, 2]])[:, :num_positions][valid].tolist()


def test_seeds_as_signed_integers() -> None:
    """The 64 bits stay the same."""
    assert [as_int64(seed) for seed in (0, 5, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 5, 2**63 - 1, -(2**63), -1]
