"""Tokens that followed the same context before: a fair bet, which finds errors that cancel over contexts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.audited import TARGET, ToyEngine

from bench.tools import detection_power
from specdec import SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.mutants import MUTANTS, maker
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import Wealth
from specdec.conformance.statistics.contexts import Contexts, seen_before
from specdec.conformance.statistics.facts import Facts
from specdec.conformance.statistics.instruments import INSTRUMENTS, Draws
from specdec.conformance.verdicts import AuditLimits
from specdec.models.markov import MarkovModel
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens

REPEAT = INSTRUMENTS["repeat"]


def followers(contexts: Contexts, prompt: list[int], output: list[int]) -> list[set[int]]:
    return [set(each) for each in contexts.followers(prompt, output)]


def test_a_context_is_a_prompt_and_all_tokens_after_it() -> None:
    contexts = Contexts()
    contexts.add([[1, 2], [1, 2], [3]], [[5, 6], [7, 6, 8], [5, 9]])
    assert followers(contexts, [1, 2], [5, 1, 0]) == [{5, 7}, {6}, set()]
    assert followers(contexts, [1, 2], [7, 6, 8]) == [{5, 7}, {6}, {8}]
    assert followers(contexts, [3], [5]) == [{5}]
    assert followers(contexts, [2], [5, 6]) == [set(), set()]


def test_reading_a_context_does_not_add_to_it() -> None:
    contexts = Contexts()
    followers(contexts, [1], [2, 3])
    assert followers(contexts, [1], [2, 3]) == [set(), set()]


def test_probabilities_and_hits_by_hand() -> None:
    """Rarities 1, 1/16, 1/256 and 1/4096; token 4 is impossible, so that it never counts."""
    row = torch.tensor([0.5, 1 / 16, 1 / 32, 1 / 512, 0.0, 1 - 0.5 - 1 / 16 - 1 / 32 - 1 / 512]).double()
    prob, hit = seen_before(row.expand(4, 6), torch.tensor([0, 3, 4, 2]), [{0, 1, 3}, {1, 2, 3}, {4, 0}, {}])
    assert prob.tolist() == [
        [0.5 + 1 / 16 + 1 / 512, 1 / 16 + 1 / 512, 1 / 512, 0],
        [1 / 16 + 1 / 32 + 1 / 512] * 2 + [1 / 512, 0],
        [0.5, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert hit.tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_float32_sums_are_probabilities() -> None:
    row = torch.full((1, 3), 1 / 3 + 1e-6)
    prob, _ = seen_before(row, torch.tensor([0]), [{0, 1, 2}])
    assert prob.max() == 1


FACTS = Facts.of(TARGET.table[0], torch.arange(8))


def draws(rows: torch.Tensor, tokens: torch.Tensor, known: list[set[int]]) -> Draws:
    """The input of the instruments, of which this one reads the last two fields only."""
    half = np.full(len(tokens), 0.5)
    return Draws(FACTS, half, half, half, half, half, *seen_before(rows, tokens, known))


def test_no_context_in_common_is_no_bet() -> None:
    reading = REPEAT.read(draws(TARGET.table[0], torch.arange(8), [set()] * 8))
    assert not reading.log_factors.any()
    assert not reading.shifts.any()


def simulated_p_value(seed: int, broken: bool = False) -> float:
    """Of 30 rounds of 8 tokens at one context of 64 tokens; broken: 16 of them are drawn four times too often."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(64, generator=generator).double().softmax(-1)
    emitted = torch.zeros(64).double().scatter_(0, torch.randperm(64, generator=generator)[:16], 1) * row
    wealth, known = Wealth(REPEAT.num_bets, 1e-7), set[int]()
    for _ in range(30):
        tokens = torch.multinomial(emitted if broken else row, 8, replacement=True, generator=generator)
        wealth.bet(REPEAT.read(draws(row.expand(8, -1), tokens, [known] * 8)).log_factors)
        known = known | set(tokens.tolist())
    return wealth.p_value


def test_p_values_are_valid() -> None:
    """P(p <= 0.05) <= 0.05: of 400 at most 45, but with probability 1e-6."""
    assert sum(simulated_p_value(seed) <= 0.05 for seed in range(400)) <= 45


def test_a_context_with_favorite_tokens_is_found_in_240_tokens() -> None:
    assert all(simulated_p_value(seed, broken=True) < 1e-7 for seed in range(5))


# -- in an audit -----------------------------------------------------------------------------------------------

SHORT = SamplingParams(max_tokens=3)
UNIFORM = MarkovModel(torch.full((1, 1, 1), 1 / 32).double().expand(32, 32, 32))


def half_of_each_context(seed: int) -> MarkovModel:
    """Another half of the tokens for every context, so that nothing but the context shows which one."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(32, 32, 32, generator=generator).argsort(-1)
    return MarkovModel((places < 16).double() / 16)


def run(engine: ToyEngine, num_draws: int, limits: AuditLimits, seed: int = 0):
    reference = Reference(engine.target, engine.params, 64)
    return audit(engine, reference, [[1, 2], [3]], num_draws=num_draws, batch_size=16, seed=seed, limits=limits)


def test_errors_that_cancel_over_contexts_are_found_by_repeats_alone() -> None:
    engine = ToyEngine(SHORT, UNIFORM, UNIFORM, speculative_target=half_of_each_context(0))
    found = run(engine, 20_000, AuditLimits())
    assert found.verdict == "lossy", found.reasons
    assert [name for name, after in found.speculative.found_after.items() if after] == ["repeat"]
    assert found.speculative.num_draws < 10_000
    assert 0 < found.tv_lower_bound < 0.5
    assert found.control.found_after["repeat"] is None


def test_a_sound_engine_whose_outputs_share_contexts_is_lossless() -> None:
    found = run(ToyEngine(SHORT), 4000, AuditLimits(max_tv=0.3))
    assert found.verdict == "lossless", found.reasons
    assert found.speculative.shifts["repeat"].estimate != 0  # there were repetitions to bet on


@pytest.mark.slow
def test_the_comparison_of_arms_is_valid_too() -> None:
    """Contexts come from both arms, so that a statistic is the same function of either answer.

    P(p <= 0.05) <= 0.05: of 100 at most 18, but with probability 1e-6.
    """
    found = [run(ToyEngine(SHORT), 480, AuditLimits(max_tv=0.3), seed) for seed in range(100)]
    assert sum(each.arms_p_value <= 0.05 for each in found) <= 18
    assert sum(each.speculative.p_values["repeat"] <= 0.05 for each in found) <= 18
    assert sum(each.control.p_values["repeat"] <= 0.05 for each in found) <= 18


def wide_pair() -> tuple[MarkovModel, MarkovModel]:
    """512 tokens, of which bfloat16 sums drop many. After token 0 comes 1 in nine of ten draws."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for _ in range(2):
        rows = torch.randn(512, 512, generator=generator).double().mul(0.3).softmax(-1)
        rows[0] = rows[0] / 10
        rows[0, 1] += 0.9
        models.append(MarkovModel(rows.expand(512, 512, 512)))
    return models[0], models[1]


@pytest.mark.parametrize("name", ["none", "M15 draft drawn in low precision"])
def test_drafts_drawn_in_low_precision_are_found_where_outputs_share_contexts(name: str) -> None:
    target, draft = wide_pair()
    params = SHORT  # the last of three tokens is not drafted
    decoder = MUTANTS.get(name, maker)(target, draft, 3)(uniforms, verify_tokens, detection_power.ROWS)
    references = [Reference(model, params) for model in (target, draft)]
    found = detection_power.judge(name, decoder, references, [(0,)], 6000)
    assert [*found.found_by] == ([] if name == "none" else ["repeat"])
    assert not found.errors
