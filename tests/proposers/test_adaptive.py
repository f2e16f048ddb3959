"""Drafts that end where another token would not pay: when they do, and that the distribution stays the target's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import HALVES, QUARTERS, FeatureTarget, ToyHead, grid_pair, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts, target_costs
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import AdaptiveLength, confidence, together
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.proposers.table import NgramTable
from specdec.requests import Batch, Generation
from specdec.verification import Rule

SURE = torch.cat([QUARTERS, torch.eye(3, dtype=torch.float64)])  # some rows leave no doubt
FREE = StepCosts((1.0,), 0.0)


class WhileSure(AdaptiveLength):
    """Continues only after tokens that the draft was certain of."""

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        return [each > 0.6 for each in reach]


@pytest.mark.parametrize("mutated", [False, True])
def test_joint_distribution_of_drafts_that_end_early(mutated: bool) -> None:
    """Exactly, while rows end their drafts at different places; the mutant ends them by looking at the token drawn."""
    target, draft = FeatureTarget(table(0, HALVES)), MarkovModel(table(10, SURE))
    lengths = set()

    def make(source, rule, max_batch_size):
        @Rule
        def recording(distribution, draft, *draws):
            lengths.update(draft.num_proposed.tolist())
            if mutated and draft.tokens.shape[1]:
                unwanted = draft.tokens.gather(1, (draft.num_proposed - 1).clamp(min=0)[:, None])[:, 0] == 0
                draft = replace(draft, num_proposed=(draft.num_proposed - unwanted.long()).clamp(min=0))
            return rule(distribution, draft, *draws)

        proposer = EagleProposer(ToyHead(draft), source, WhileSure(FREE))
        return Decoder(target, proposer, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    prompt, num_tokens = (0, 1), 4
    distribution = exact_distribution(make, prompt, num_tokens, (4, 2, 2))
    found = distance(distribution, joint_distribution(target, prompt, num_tokens))
    assert found > 0.01 if mutated else found < 1e-12
    assert lengths >= {1, 2}


COPY_COSTS = StepCosts((1.0, 1.6, 2.2), 0.0)  # at first two tokens pay, after rejections one or none


class EachRowAlone(NgramProposer):
    """Copies by the real rule, but a row learns from its own past only: the grid's rows are runs beside each other."""

    def __init__(self) -> None:
        super().__init__(3, torch.device("cpu"))
        self.proposers: dict[Generation, NgramProposer] = {}

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        return [
            self._proposer(row).guess(replace(batch, rows=[row]), [limit])[0] if row else []
            for row, limit in zip(batch.rows, limits, strict=True)
        ]

    def _proposer(self, row: Generation) -> NgramProposer:
        new = NgramProposer(3, torch.device("cpu"), partial(LookupIndex, 1, 2), AdaptiveLength(COPY_COSTS))
        return self.proposers.setdefault(row, new)


@pytest.mark.parametrize("mutated", [False, True])
@pytest.mark.parametrize("hybrid", [False, True])
def test_joint_distribution_of_copies_that_end_early(hybrid: bool, mutated: bool) -> None:
    """Exactly, while a row copies less after rejections; the mutant ends a copy by looking at an accept uniform."""
    target, draft = MarkovModel(table(0, HALVES)), MarkovModel(table(10, HALVES))
    lengths = set()

    def make(source, rule, max_batch_size):
        @Rule
        def recording(distribution, draft, accept, final):
            lengths.update(draft.num_proposed.tolist())
            if mutated and draft.tokens.shape[1]:
                last = (draft.num_proposed - 1).clamp(min=0)[:, None]
                unwanted = (accept.gather(1, last)[:, 0] > 0.5) & (draft.num_proposed > 0)
                draft = replace(draft, num_proposed=draft.num_proposed - unwanted.long())
            return rule(distribution, draft, accept, final)

        proposer = EachRowAlone()
        if hybrid:
            proposer = HybridProposer(proposer, DraftModelProposer(draft, source), 1)
        return Decoder(target, proposer, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    prompt, num_tokens = (0, 1, 2, 0, 1, 2), 5
    distribution = exact_distribution(make, prompt, num_tokens, (2 if hybrid else 1, 2, 2))
    found = distance(distribution, joint_distribution(target, prompt, num_tokens))
    assert found > 0.01 if mutated else found < 1e-12
    assert lengths == {0, 1, 2}


def test_the_rule_for_copies() -> None:
    """A step of one second and a twentieth for each further token; four of five are accepted at first."""
    adaptive = AdaptiveLength(StepCosts(tuple(1 + 0.05 * width for width in range(MAX_DRAFT_LENGTH + 1)), 0.0))
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == MAX_DRAFT_LENGTH, (
        "0.8 ** 8 tokens are more than the 0.05 that the time would make"
    )
    costly = AdaptiveLength(StepCosts(tuple(1 + 0.3 * width for width in range(MAX_DRAFT_LENGTH + 1)), 0.0))
    assert costly.num_copied([MAX_DRAFT_LENGTH], 1) == 5, "0.8 ** 5 > 0.3 > 0.8 ** 6"
    assert costly.num_copied([3], 1) == 3, "there is no more"
    assert costly.num_copied([MAX_DRAFT_LENGTH, MAX_DRAFT_LENGTH], 2) == 5, (
        "two rows make 0.6 tokens in that time, and 1.6 if both copy"
    )
    assert costly.num_copied([MAX_DRAFT_LENGTH], 2) == 2, (
        "0.8 ** 2 > 0.6 > 0.8 ** 3 if one does: the other waits for it"
    )
    assert costly.num_copied([MAX_DRAFT_LENGTH, 2], 2) == 2
    assert costly.num_copied([MAX_DRAFT_LENGTH], 8) == costly.num_copied([], 1) == 0


def test_copy_lengths_follow_the_acceptance_of_earlier_copies() -> None:
    adaptive = AdaptiveLength(StepCosts(tuple(1 + 0.3 * width for width in range(MAX_DRAFT_LENGTH + 1)), 0.0))
    for _ in range(300):
        adaptive.observe_copy(5, 2)
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == 2, "two are always accepted, the third never"
    for _ in range(300):
        adaptive.observe_copy(2, 0)
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == 0, "none is"
    for _ in range(300):
        adaptive.observe_copy(0, 0)
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == 5, "it is tried again"


def test_a_step_in_the_cost_is_crossed_if_the_gain_beyond_it_is_large_enough() -> None:
    """The second token costs half a step, later ones nothing: as with kernels that take tokens by the block."""
    adaptive = AdaptiveLength(StepCosts((1.0, 1.0, *(1.5,) * (MAX_DRAFT_LENGTH - 1)), 0.0))
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == MAX_DRAFT_LENGTH
    for _ in range(60):
        adaptive.observe_copy(3, 1)
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == 1


@pytest.mark.parametrize(("rate", "slope_s"), [(1.0, 0.02), (0.0, 0.3)])
def test_the_engine_copies_while_copies_are_accepted(
    rate: float, slope_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A greedy Markov target repeats itself, so there is always something to copy; what is accepted is prescribed."""
    costs_s = tuple(1 + slope_s * width for width in range(MAX_DRAFT_LENGTH + 1))
    monkeypatch.setattr("specdec.assembly.target_costs", lambda target, rows, records: costs_s)
    options = {"num_speculative_tokens": "auto", "synthetic_acceptance_rates": [rate] * MAX_DRAFT_LENGTH}
    engine = Engine(grid_pair(1)[0], method="ngram", **options)
    completion = engine.generate([[0, 1, 2] * 3], SamplingParams(temperature=0, max_tokens=200))[0]
    drafted = [step.num_drafted for step in completion.steps]
    if rate == 1:
        assert set(drafted[:-2]) <= {0, MAX_DRAFT_LENGTH}  # none where nothing matches yet
        assert drafted.count(MAX_DRAFT_LENGTH) > 15
    else:
        assert 0 < sum(drafted[100:]) < 0.3 * len(drafted[100:]), "given up, and tried again"


@pytest.mark.parametrize("method", ["ngram", "ngram_store", "ngram_table", "hybrid"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_output_with_copies_that_end_early_is_plain_decoding(method: str, max_batch_size: int) -> None:
    target, draft = grid_pair(4)
    drafts = {"ngram_table": NgramTable.count([[0, 1, 2, 0, 1, 1, 2, 0, 2, 1, 0, 1, 2]], 3), "hybrid": draft}
    options = {"num_speculative_tokens": "auto", "max_batch_size": max_batch_size}
    engine = Engine(target, method=method, draft=drafts.get(method), **options)
    prompts, params = [[0, 1, 2, 0], [2], [1, 1], [0, 2, 1]], SamplingParams(temperature=0, max_tokens=30)
    plain = [completion.token_ids for completion in Engine(target).generate(prompts, params)]
    assert [completion.token_ids for completion in engine.generate(prompts, params)] == plain


def test_the_rule() -> None:
    """A step of one second for any width, a draft token for a tenth: three of five are accepted at first."""
    adaptive = AdaptiveLength(StepCosts((1.0,) * (MAX_DRAFT_LENGTH + 1), 0.1))
    assert adaptive.pays([1.0, 0.17, 0.16], 0) == [True, True, True]
    alone = [adaptive.pays([reach], 1)[0] for reach in (0.17, 0.16)]
    assert alone == [True, False], "0.1 s must bring 0.1 tokens: 0.6 times 1/6"
    for _ in range(300):
        adaptive.observe([(4, 0)])
    assert not adaptive.pays([1.0], 0)[0], "nothing is ever accepted"
    for _ in range(300):
        adaptive.observe([(0, 0)])
    assert adaptive.pays([1.0], 0)[0], "it is tried again"
    for _ in range(300):
        adaptive.observe([(4, 4)])
    assert not adaptive.pays([0.3], 4)[0], "five tokens in 1.4 s are the rate to beat"
    assert adaptive.pays([0.6], 4)[0]


def test_a_draft_costs_time_to_begin_with() -> None:
    """Half a second for the first token, nothing for the others: none pays that does not pay that."""
    adaptive = AdaptiveLength(StepCosts((1.0,) * (MAX_DRAFT_LENGTH + 1), 0.0, 0.5))
    assert [adaptive.costs(1).step_s(number) for number in (0, 1, 2)] == [1.0, 1.5, 1.5]
    assert adaptive.pays([0.8], 0) == [False], "0.6 times 0.8 is less than the 0.5 that the time would make"
    assert adaptive.pays([0.9], 0) == adaptive.pays([0.1], 1) == [True]


def test_rows_share_the_cost_of_a_step() -> None:
    """A further token of the step costs 0.2 s; three of five are accepted at first."""
    adaptive = AdaptiveLength(StepCosts(tuple(1 + 0.2 * width for width in range(MAX_DRAFT_LENGTH + 1)), 0.0))
    assert adaptive.pays([0.34], 0) == [True], "0.6 times 0.34 is more than the 0.2 that the time would make"
    assert adaptive.pays([0.32], 0) == [False]
    assert adaptive.pays([0.32, 0.36], 0) == [True, True], "the sure row pays for the other"
    assert adaptive.pays([0.5, 0.1], 0) == [False, False]
    assert adaptive.pays([0.8, 0.0], 0) == [True, False], "the other's draft has ended"
    assert adaptive.pays([1.0, 0.0, 0.0, 0.0], 0) == [False] * 4, "four rows make 0.8 tokens in that time"


def test_costs_depend_on_how_many_rows_there_are() -> None:
    """Between what was measured they are interpolated; five rows whose drafts double the step have none."""
    few, many = StepCosts((1.0, 1.0), 0.0), StepCosts((2.0, 4.0), 0.4, 0.2)
    adaptive = AdaptiveLength({1: few, 5: many})
    assert [adaptive.costs(rows) for rows in (1, 3, 5, 9)] == [few, StepCosts((1.5, 2.5), 0.2, 0.1), many, many]
    assert adaptive.num_copied([1], 1) == 1
    assert adaptive.num_copied([1] * 5, 5) == 0, "0.8 for each of them is less than what a second step would make"
    for _ in range(300):
        adaptive.observe([(0, 0)] * 5)
    assert adaptive.num_copied([1], 1) == 1, "the steps of all five tell nothing about the time of one"


def test_costs_between_three_measurements() -> None:
    """Each number of rows lies between its two neighbors; below and above all of them the nearest one counts."""
    measured = {2: StepCosts((1.0,), 0.1), 4: StepCosts((3.0,), 0.3), 8: StepCosts((4.0,), 0.5)}
    adaptive = AdaptiveLength(measured)
    assert [adaptive.costs(rows).step_s(0) for rows in (1, 2, 3, 4, 5, 8, 9)] == [1.0, 1.0, 2.0, 3.0, 3.25, 4.0, 4.0]


def test_the_best_length_has_the_largest_gain() -> None:
    """A step without draft takes 2 s and gives a token per row, so a second is worth half a token per row."""
    adaptive = AdaptiveLength(StepCosts((2.0, 2.2, 2.6, 3.4), 0.4, 0.1))
    reach = [0.8, 0.6, 0.3]
    assert adaptive.best_length(reach, 1) == (2, pytest.approx(1.4 - 0.6 / 2))
    assert adaptive.best_length(reach, 1, drawn=True) == (2, pytest.approx(1.4 - (0.6 + 0.1 + 2 * 0.4) / 2))
    assert adaptive.best_length(reach, 2) == (2, pytest.approx(1.4 - 0.6))
    assert adaptive.best_length([0.05], 1) == (0, 0.0)


def test_one_step_is_counted_exactly() -> None:
    """Two rows draft 3 and 2 tokens, of which 1 and 2 are accepted and 2 and 2 tested, in a step of 3.4 s, not 2."""
    adaptive = AdaptiveLength(StepCosts((2.0, 2.2, 2.6, 3.4), 0.0))
    adaptive.observe([(3, 1), (2, 2)])
    tokens_per_s = 2 * (0.98 + 1 + 3 / 2) / ((0.98 + 3.4 / 2) * 2.0)
    assert adaptive.best_length([2.0], 2) == (1, pytest.approx(2.0 - tokens_per_s * 0.2))
    worth = tokens_per_s * 0.2 / ((3 + 3) / (5 + 4))
    assert [adaptive.pays([reach, 0.0], 0)[0] for reach in (worth - 1e-9, worth + 1e-9)] == [False, True]


def test_a_copy_tests_one_token_after_those_accepted() -> None:
    """Two of five are accepted: 5/6, 5/6, 4/6 of the first three then pass, and 4/5 of the others as before. That the
    first four do has probability 0.37, and 0.31 if the fourth counts as tested; a token costs 0.35.
    """
    adaptive = AdaptiveLength(StepCosts(tuple(1 + 0.35 * width for width in range(MAX_DRAFT_LENGTH + 1)), 0.0))
    adaptive.observe_copy(5, 2)
    assert adaptive.num_copied([MAX_DRAFT_LENGTH], 1) == 4


def test_drafts_of_unequal_lengths_together() -> None:
    assert together([[0.5, 0.25], [0.5]]) == [1.0, 0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_confidence_of_large_logits(dtype: torch.dtype) -> None:
    """exp(300) is infinite in float32. Kernels or the portable code: each dtype takes one of them."""
    logits = torch.tensor([[300.0, 301.0, 299.0], [-300.0, -300.0, -torch.inf]], dtype=dtype)
    expected = torch.tensor([1 / (1 + math.exp(-1) + math.exp(-2)), 0.5])
    torch.testing.assert_close(confidence(logits), expected)


def test_confidence_is_the_largest_probability() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(confidence(logits), logits.softmax(-1).amax(-1))
    assert confidence(torch.tensor([[0.0, -torch.inf]])).item() == 1


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_auto_through_the_engine(method: str, max_batch_size: int) -> None:
    """Greedy output is plain decoding's; a draft that is the target is followed far."""
    target = FeatureTarget(grid_pair(1)[0].table)
    draft = ToyHead(target) if method == "eagle" else target
    options = {"num_speculative_tokens": "auto", "max_batch_size": max_batch_size}
    engine = Engine(target, method=method, draft=draft, **options)
    prompts, params = [[0, 1, 2], [2], [1, 1]], SamplingParams(temperature=0, max_tokens=30)
    plain = Engine(target).generate(prompts, params)
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert all(c.counts.num_accepted == c.counts.num_drafted for c in completions)
    assert {step.num_drafted for c in completions for step in c.steps} <= set(range(MAX_DRAFT_LENGTH + 1))


def test_costs_are_measured_for_every_width() -> None:
    costs = target_costs(grid_pair(1)[0], rows=2)
    assert len(costs) == MAX_DRAFT_LENGTH + 1
    assert min(costs) > 0
