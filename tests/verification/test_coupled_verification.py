"""Coupled verification: for a given seed the output equals that of plain decoding, whatever is proposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import tiny
from helpers.drafts import HEAD_METHODS, parallel
from helpers.strategies import distributions
from helpers.toys import ExitTarget
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec import METHODS, Engine, SamplingParams
from specdec.conformance.gates import marginal, passes, radius
from specdec.conformance.mutants import maker
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair, joint_distribution
from specdec.decoding import Decoder
from specdec.heads.eagle import new_head
from specdec.models.base import LanguageModel
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.table import NgramTable
from specdec.requests import Request
from specdec.sampling.distributions import Dense, OneHot, Partial, race
from specdec.sampling.randomness import Role, UniformSource, noise, uniforms
from specdec.verification import Draft, verify_coupled

LARGEST = 1 - 2.0**-53  # the largest possible uniform

# -- the race ------------------------------------------------------------------------------------------------


@given(distributions(5), st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.9, LARGEST]), min_size=5, max_size=5))
def test_the_winner_has_the_shortest_waiting_time_and_positive_probability(
    distribution: Tensor, uniforms: list[float]
) -> None:
    waits = -torch.log1p(-torch.tensor(uniforms, dtype=torch.float64))
    for probs in (distribution, distribution.float()):
        winner = int(race(probs, torch.tensor(uniforms, dtype=torch.float64)))
        assert distribution[winner] > 0
        possible = [token for token in range(5) if distribution[token] > 0]
        assert all(
            waits[winner] * distribution[token] <= waits[token] * distribution[winner] * (1 + 1e-6)
            for token in possible
        )


@given(st.integers(1, 9), st.integers(0, 9))
def test_a_race_of_two_over_a_grid_follows_the_distribution(one: int, other: int) -> None:
    """The first token's share of both waiting times is uniform, and it wins if the share is below its probability."""
    total = one + other
    share = (torch.arange(total).double() + 0.5) / total
    waits = torch.stack([share, 1 - share], 1)
    winners = race(torch.tensor([one, other]).double().expand(total, -1) / total, -torch.expm1(-waits))
    assert (winners == 0).sum() == one


def test_a_partial_distribution_uses_its_own_tokens_noise() -> None:
    """At several positions at once, the same token wins as in the dense form."""
    torch.manual_seed(0)
    tokens = torch.tensor([1, 4, 5, 8])
    partial_distribution = Partial(Dense(torch.rand(6, 3, 4).softmax(-1)), tokens, 10)
    draws = torch.rand(6, 3, 10, dtype=torch.float64)
    assert torch.equal(partial_distribution.draw(draws), Dense(partial_distribution.dense()).draw(draws))


def test_noise_differs_between_positions_tokens_and_seeds_and_from_other_draws() -> None:
    seeds, positions = torch.tensor([3, 4]), torch.tensor([[7, 8, 9], [7, 8, 9]])
    drawn = noise(seeds, positions, 11)
    assert drawn.shape == (2, 3, 11)
    one = uniforms(torch.tensor(4), torch.tensor(8), torch.tensor(Role.COUPLED), torch.tensor(5))
    assert drawn[1, 1, 5] == one
    others = uniforms(seeds.view(-1, 1, 1, 1), *_all(3, 10, 11))  # every other role
    assert torch.cat([drawn.flatten(), others.flatten()]).unique().numel() == drawn.numel() + others.numel()


def _all(*sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """All combinations of positions, roles and origins."""
    roles, positions, origins = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    return positions, roles, origins


# -- the rule ------------------------------------------------------------------------------------------------


def favouring(tokens: list[int], vocab_size: int = 4) -> Tensor:
    """Noise with which these tokens win under a uniform distribution: float64 [len(tokens), vocab]."""
    return torch.full((len(tokens), vocab_size), 0.5).double().scatter(1, torch.tensor(tokens).unsqueeze(1), 0.25)


def decide(drafted: list[int], length: int, favoured: list[int]) -> tuple[int, int]:
    """(accepted, next token) of a draft under uniform distributions with noise that favours these tokens."""
    draft = Draft.deterministic(torch.tensor([drafted]), torch.tensor([length]), 4)
    target = Dense(torch.full((1, len(drafted) + 1, 4), 0.25))
    outcome = verify_coupled(target, draft, torch.zeros(1, len(drafted)), favouring(favoured).unsqueeze(0))
    return outcome.accepted.item(), outcome.next_token.item()


def test_the_draft_is_accepted_while_the_target_samples_the_same() -> None:
    assert decide([1, 2], 2, [1, 2, 3]) == (2, 3)  # bonus
    assert decide([1, 0], 2, [1, 2, 3]) == (1, 2)  # recovered: the target's own token
    assert decide([0, 2], 2, [1, 2, 3]) == (0, 1)  # a match after a mismatch does not count
    assert decide([1, 2], 1, [1, 2, 3]) == (1, 2)  # padding is not proposed
    assert decide([], 0, [3]) == (0, 3)  # plain decoding


def test_greedy_rows_need_no_noise() -> None:
    target = OneHot(torch.tensor([[5, 6, 7], [5, 6, 7]]), vocab_size=9)
    draft = Draft.deterministic(torch.tensor([[5, 6], [5, 0]]), torch.tensor([2, 2]), 9)
    outcome = verify_coupled(target, draft, torch.zeros(2, 2), torch.zeros(2, 3))
    assert outcome.accepted.tolist() == [2, 1]
    assert outcome.next_token.tolist() == [7, 6]


# -- identical to plain decoding -----------------------------------------------------------------------------

TARGET, DRAFT = grid_pair(12)
TABLE = NgramTable.count([[0, 1, 2, 0, 1, 1, 2, 0, 2, 1, 0, 1, 2]], 3)
SAMPLED = [
    SamplingParams(max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.9, max_tokens=25, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.3, min_p=0.02, max_tokens=17, ignore_eos=True),
    SamplingParams(frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={1: 1.0}, max_tokens=22, ignore_eos=True),
    SamplingParams(top_p=0.8, max_tokens=30, stop_token_ids=(2,), ignore_eos=True),
    SamplingParams(
        logit_bias={1: 9.0, 2: 9.0}, max_tokens=25, ignore_eos=True
    ),  # repetitive, so that there is something to copy
]


def emitted(engine: Engine, num_seeds: int = 2) -> list[tuple[int, ...]]:
    """Outputs for all sampling parameters and seeds, with more requests than slots."""
    params = [replace(each, seed=seed) for seed in range(num_seeds) for each in SAMPLED]
    vocab_size = engine.target.vocab_size
    prompts = [[token % vocab_size for token in tiny.PROMPTS[i % len(tiny.PROMPTS)]] for i in range(len(params))]
    completions = engine.generate(prompts, params)
    if engine.method != "autoregressive":
        num_accepted = sum(completion.counts.num_accepted for completion in completions)
        assert 0 < num_accepted < sum(completion.counts.num_drafted for completion in completions)
    return [completion.token_ids for completion in completions]


@cache
def plainly_emitted(make_target: Callable[[], LanguageModel]) -> list[tuple[int, ...]]:
    """Of a target without a draft, which no draft may change."""
    return emitted(Engine(make_target(), verification="coupled"))


def toy() -> ExitTarget:
    return ExitTarget(TARGET.table, DRAFT.table)


def llama() -> CausalLM:
    return CausalLM(tiny.make("llama", tiny.GQA))


NO_TOYS = [method for method in HEAD_METHODS if method != "eagle"]  # their formats are tested with each


def drafts_for(method: str, target) -> dict:
    if isinstance(target, CausalLM):
        model = CausalLM(tiny.make("gpt2", tiny.SMALL))
        head = new_head(target.model, torch.arange(0, 61, 2)).eval()
        return {"draft": {"draft_model": model, "hybrid": head, "eagle": head, "tree": head}.get(method)}
    drafts = {"draft_model": DRAFT, "hybrid": DRAFT, "tree": DRAFT, "ngram_table": TABLE, "eagle": ToyHead(DRAFT)}
    drafts["pard"] = parallel(DRAFT)
    return {"draft": drafts.get(method)}


@pytest.mark.parametrize("max_batch_size", [1, 5])
@pytest.mark.parametrize("gamma", [1, 3, 6, "auto"])
@pytest.mark.parametrize(
    "method", [method for method in METHODS if method != "autoregressive" and method not in NO_TOYS]
)
def test_toy_output_does_not_depend_on_the_draft(method: str, gamma: int | str, max_batch_size: int) -> None:
    """To the last token, with every sampling parameter, in any batch, in slots that are reused."""
    target = toy()
    engine = Engine(
        target,
        method=method,
        num_speculative_tokens=gamma,
        max_batch_size=max_batch_size,
        verification="coupled",
        **drafts_for(method, target),
    )
    if gamma != "auto":
        assert emitted(engine) == plainly_emitted(toy)
    else:  # draft lengths depend on the clock; nothing may be drafted at all
        params = [replace(SAMPLED[0], seed=seed) for seed in range(6)]
        plain = Engine(target, verification="coupled")
        drafted, undrafted = (each.generate([[0, 1, 2, 0, 1]] * 6, params) for each in (engine, plain))
        assert [c.token_ids for c in drafted] == [c.token_ids for c in undrafted]


@pytest.mark.parametrize("verification", ["token", "block"])
def test_other_rules_give_other_tokens(verification: str) -> None:
    """Same distribution, different tokens: only shared noise makes them equal."""
    engine = Engine(TARGET, method="draft_model", draft=DRAFT, verification=verification)
    assert emitted(engine) != emitted(Engine(TARGET, verification="coupled"))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize(("gamma", "max_batch_size"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("method", ["draft_model", "eagle", "ngram", "hybrid"])
def test_float32_models_give_the_same_output(method: str, gamma: int, max_batch_size: int, records: bool) -> None:
    """Random Llama and GPT-2, and a head with half the vocabulary; with and without CUDA graphs.

    Logits of a wider step differ by rounding, about 1e-6. That changes a race only if two waiting times are that
    close: probability below 1e-3 for these 320 tokens, and seeds are fixed, so it happens always or never.
    """
    target = llama()
    options = {"num_speculative_tokens": gamma, "max_batch_size": max_batch_size, "verification": "coupled"}
    engine = Engine(target, method=method, records=records, **options, **drafts_for(method, target))
    assert emitted(engine) == plainly_emitted(llama)


def test_a_self_draft_is_always_accepted() -> None:
    """Draft and target see the same noise, for draft heads and draft models alike."""
    target = FeatureTarget(TARGET.table)
    for method, draft in (("draft_model", TARGET), ("eagle", ToyHead(target))):
        engine = Engine(target, method=method, draft=draft, verification="coupled", max_batch_size=5)
        for completion in engine.generate([[1, 2]] * 20, [SamplingParams(max_tokens=33, seed=i) for i in range(20)]):
            assert completion.counts.num_accepted == completion.counts.num_drafted > 0


# -- the distribution, and which check detects what -------------------------------------------------------------------

PROMPT, NUM_DRAWS, SUPPORT = (1, 2), 4000, 9


def draws(make, num_tokens: int = 4) -> list[tuple[int, ...]]:
    """One output of the decoding loop per seed."""
    params = SamplingParams(max_tokens=num_tokens)
    requests = [Request(i, PROMPT, replace(params, seed=i)) for i in range(NUM_DRAWS)]
    rows = sorted(make(uniforms, verify_coupled, NUM_DRAWS).run(requests), key=lambda row: row.request.index)
    return [tuple(row.output) for row in rows]


@cache
def plain_draws() -> list[tuple[int, ...]]:
    """Without a draft."""

    def make(source, rule, max_batch_size):
        return Decoder(TARGET, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    return draws(make)


def passing(outputs: list[tuple[int, ...]]) -> list[bool]:
    """Whether each pair of neighbouring tokens passes the gate."""
    distribution = joint_distribution(TARGET, PROMPT, 4)
    return [
        passes([output[i : i + 2] for output in outputs], marginal(distribution, (i, i + 1)), SUPPORT) for i in range(3)
    ]


def share_noise_between_positions(source: UniformSource) -> UniformSource:
    """Noise keyed by token only, so neighbouring tokens are correlated."""

    def shared(seeds, positions, roles, origins):
        return source(seeds, torch.where(roles == Role.COUPLED, 0, positions), roles, origins)

    return shared


class KeyedByOrigin(Decoder):
    """Noise keyed by the draft's origin too: same distribution, but the sample depends on where drafts begin."""

    def _draws(self, rows, origins, draft):
        return super()._draws(replace(rows, seeds=rows.seeds + 7919 * origins), origins, draft)


class IndependentNoise(DraftModelProposer):
    """A draft sampled with noise of its own."""

    def __init__(self, model: MarkovModel, source: UniformSource) -> None:
        super().__init__(model, lambda seeds, *key: source(seeds + 7919, *key))


def test_gate_passes_the_coupled_sampler() -> None:
    """False-alarm probability at most 3e-6, for any seeds."""
    outputs = draws(maker(TARGET, DRAFT, 2))
    assert passing(outputs) == [True] * 3
    assert outputs == plain_draws()


def test_noise_shared_between_positions_is_caught() -> None:
    """Detected with probability at least 1 - 1e-6 if the distance exceeds twice the radius; it is over 0.2."""
    broken = draws(maker(TARGET, DRAFT, 2, break_uniforms=share_noise_between_positions))
    distribution = marginal(joint_distribution(TARGET, PROMPT, 4), (1, 2))
    never = [pair for pair in distribution if pair not in {output[1:3] for output in broken}]
    assert sum(distribution[pair] for pair in never) > 2 * radius(NUM_DRAWS, SUPPORT)
    assert passing(broken)[1] is False


def test_noise_keyed_by_the_origin_is_caught_by_equality() -> None:
    """Its distribution is the target's, so no gate detects it."""
    broken = draws(maker(TARGET, DRAFT, 2, decoder=KeyedByOrigin))
    assert passing(broken) == [True] * 3
    assert broken != plain_draws()


def test_a_draft_with_independent_noise_is_lossless_but_accepted_less() -> None:
    make = maker(TARGET, TARGET, 3, proposer=IndependentNoise)
    requests = [Request(i, PROMPT, SamplingParams(max_tokens=12, seed=i)) for i in range(50)]
    steps = [step for row in make(uniforms, verify_coupled, 50).run(requests) for step in row.steps]
    assert sum(step.num_accepted for step in steps) < 0.8 * sum(step.num_drafted for step in steps)
    assert draws(make) == plain_draws()


def test_coupled_acceptance_rate() -> None:
    """It is the sum over tokens v of 1 / sum_w max(p_w / p_v, q_w / q_v); 40,000 races, Hoeffding radius at 1e-6."""
    first, second = (torch.tensor(weights).double() / 4 for weights in ([2, 1, 1], [1, 1, 2]))
    shared = noise(torch.arange(40_000), torch.zeros(40_000, 1).long(), 3)[:, 0]
    winners = [race(distribution.expand(40_000, -1), shared) for distribution in (first, second)]
    both = 1 / torch.maximum(first / first[:, None], second / second[:, None]).sum(1)
    rate = (winners[0] == winners[1]).double().mean().item()
    assert abs(rate - both.sum().item()) < (torch.log(torch.tensor(2e6)) / 80_000).sqrt()
    other = (winners[0] == winners[1].roll(1)).double().mean().item()  # with independent noise
    assert abs(other - both.sum().item()) > 2 * (torch.log(torch.tensor(2e6)) / 80_000).sqrt()
