"""One arm of an audit, given outputs made by hand: its numbers are those of its instruments, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.audited import DRAFT, PROMPTS, TARGET, ToyEngine
from helpers.toys import top_k_distribution

from specdec import SamplingParams
from specdec.conformance.arms import Answers, Arm, _Repeats
from specdec.conformance.certificate import ArmFindings
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import Shift, Wealth
from specdec.conformance.statistics.contexts import RARITIES, Contexts
from specdec.conformance.statistics.facts import Facts
from specdec.conformance.statistics.instruments import INSTRUMENTS, Draws
from specdec.conformance.verdicts import AuditLimits
from specdec.models.markov import MarkovModel
from specdec.proposers.ngram import LookupIndex
from specdec.sampling.randomness import uniforms

PARAMS = SamplingParams(max_tokens=12)
LIMITS = AuditLimits(alpha=0.01, logit_noise=1e-3)
NUMBER, SEED = 1, 5  # of the arm and of the audit


def answers(outputs: Sequence[Sequence[int]], first_seed: int = 0, prompts=PROMPTS) -> Answers:
    seeds = [first_seed + 2 * index for index in range(len(outputs))]
    return Answers(range(len(outputs)), prompts[: len(outputs)], seeds, outputs)


def two_rounds() -> list[Answers]:
    """72 tokens of the plain toy engine, and one of an output replaced by another."""
    engine = ToyEngine(PARAMS)
    rounds = [answers(engine.plain(PROMPTS, seeds, 12), seeds[0]) for seeds in ([0, 2, 4], [6, 8, 10])]
    rounds[1].outputs[0][4] = (rounds[1].outputs[0][4] + 3) % 8
    rounds[1].outputs[2][:2] = rounds[0].outputs[2][:2]  # so that a context and what follows it come twice
    return rounds


def observed(arm: Arm, rounds: Sequence[Answers], contexts: Contexts) -> np.ndarray:
    """The arm's sums of the rounds, each added to the contexts of later ones, as an audit does."""
    sums = []
    for each in rounds:
        sums.append(arm.observe(each, 12))
        contexts.add(each.prompts, each.outputs)
    return np.concatenate(sums)


def arm_of(
    params: SamplingParams,
    num_draws: int,
    draft: MarkovModel | None = DRAFT,
    rows: int = 8,
    contexts: Contexts | None = None,
) -> Arm:
    drafts = Reference(draft, params, rows) if draft else None
    return Arm(NUMBER, Reference(TARGET, params, rows), drafts, num_draws, SEED, LIMITS, contexts or Contexts())


class Oracle:
    """All tokens of some rounds, tested at once, by the definitions of `Draws` and of the findings."""

    def __init__(self, rounds: Sequence[Answers], top_k: int, has_draft: bool) -> None:
        self.outputs = [output for each in rounds for output in each.outputs]
        prompts = [prompt for each in rounds for prompt in each.prompts]
        self.texts = [
            ([*prompt, *output[:place]], output[place])
            for prompt, output in zip(prompts, self.outputs, strict=True)
            for place in range(len(output))
        ]
        self.names = [name for name in INSTRUMENTS if has_draft or name != "draft"]
        self.level = 0.01 / (len(self.names) + 1)
        self.probs = self.rows(TARGET, top_k)
        self.tokens = torch.tensor([token for _, token in self.texts])
        self.round_of = [number for number, each in enumerate(rounds) for output in each.outputs for _ in output]
        self.facts = Facts.of(self.probs, self.tokens, self.rows(DRAFT, top_k) if has_draft else None)
        self.readings = {name: INSTRUMENTS[name].read(self.draws()) for name in self.names}

    def rows(self, model, top_k: int) -> torch.Tensor:
        pairs = [[0, *text][-2:] for text, _ in self.texts]
        return torch.stack([top_k_distribution(model.table[a, b], top_k) for a, b in pairs])

    def uniforms(self, role: int) -> np.ndarray:
        """A key below 0 is of no request."""
        key, roles, number = (torch.tensor([each]) for each in (-1 - SEED, role, NUMBER))
        return uniforms(key, torch.arange(len(self.texts)), roles, number).numpy()

    def repeats(self) -> tuple[np.ndarray, np.ndarray]:
        """Total probability of the tokens that followed the same text in earlier rounds, up to each rarity, and
        whether the token is one of them."""
        prob, seen = np.zeros((2, len(self.texts), len(RARITIES)))
        for place, (text, token) in enumerate(self.texts):
            earlier = {
                other
                for number, (other_text, other) in zip(self.round_of, self.texts, strict=True)
                if number < self.round_of[place] and other_text == text
            }
            for index, rarity in enumerate(RARITIES):
                rare = [each for each in earlier if 0 < self.probs[place, each] <= rarity]
                prob[place, index] = sum(float(self.probs[place, each]) for each in rare)
                seen[place, index] = token in rare
        return prob, seen

    def draws(self) -> Draws:
        place = self.facts.before + self.uniforms(0) * self.facts.prob
        guesses = [LookupIndex().continuation(text, 1) for text, _ in self.texts]
        seen_prob, seen = self.repeats()
        known = [float(row[guess[0]]) if guess else math.nan for row, guess in zip(self.probs, guesses, strict=True)]
        return Draws(
            facts=self.facts,
            rank=self.facts.above + self.uniforms(1) * self.facts.prob,
            place=place,
            place_before=np.array([0.5, *place[:-1]]),
            guess_prob=np.array(known),
            hit=np.array([float(guess == [token]) for guess, (_, token) in zip(guesses, self.texts, strict=True)]),
            seen_prob=seen_prob,
            seen=seen,
        )

    def evidence(self, name: str, num_draws: int) -> tuple[Wealth, Shift]:
        reading, instrument = self.readings[name], INSTRUMENTS[name]
        wealth, shift = Wealth(instrument.num_bets, self.level), Shift(instrument.span, num_draws)
        wealth.bet(reading.log_factors[:num_draws])
        shift.add(reading.shifts[:num_draws, 0])
        return wealth, shift

    def surprise_z(self, num_draws: int) -> float:
        """Tokens of probability 0 say nothing, but the variance of their distributions counts."""
        prob, entropy = self.facts.prob[:num_draws], self.facts.entropy[:num_draws]
        surprises = sum(math.log(p) + h for p, h in zip(prob, entropy, strict=True) if p)
        return surprises / math.sqrt(self.facts.variance[:num_draws].sum())

    def sums(self) -> np.ndarray:
        """Of each output: how many of its tokens have probability 0, then the deviations."""
        columns = [self.facts.prob[:, None] == 0, *(self.readings[name].shifts for name in self.names)]
        ends = np.cumsum([len(output) for output in self.outputs])[:-1]
        return np.stack([part.sum(0) for part in np.split(np.concatenate(columns, 1), ends)])


def assert_found_as_by(oracle: Oracle, found: ArmFindings, num_draws: int) -> None:
    for name in oracle.names:
        wealth, shift = oracle.evidence(name, num_draws)
        assert found.p_values[name] == pytest.approx(wealth.p_value, rel=1e-9)
        assert found.found_after[name] == wealth.found_after
        interval, expected = found.shifts[name], shift.interval(oracle.level)
        assert (interval.estimate, interval.low) == pytest.approx((expected.estimate, expected.low), rel=1e-9)
    assert found.surprise_z == pytest.approx(oracle.surprise_z(num_draws), rel=1e-9)


@pytest.mark.parametrize("has_draft", [True, False])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("num_draws", [50, 72, 500])
def test_the_evidence_is_that_of_the_instruments(num_draws: int, rows: int, has_draft: bool) -> None:
    """Over the first `num_draws` tokens only, in whatever batches they come; sums over all of them."""
    rounds, contexts = two_rounds(), Contexts()
    arm = arm_of(PARAMS, num_draws, DRAFT if has_draft else None, rows, contexts)
    oracle, sums = Oracle(rounds, 0, has_draft), observed(arm, rounds, contexts)
    assert oracle.repeats()[1].any()
    found, used = arm.findings(), min(num_draws, 72)
    assert sums == pytest.approx(oracle.sums(), abs=1e-9)
    assert arm.num_statistics == sums.shape[1]
    assert_found_as_by(oracle, found, num_draws)
    assert found.p_value == min(1.0, (len(oracle.names) + 1) * min(found.p_values[name] for name in oracle.names))
    assert found.p_values["support"] == 1
    assert (found.num_draws, arm.num_draws, found.num_outputs, found.seeds) == (used, used, 6, (0, 10))
    assert (found.num_outside, found.largest_gap, found.errors) == ({"by rounding": 0, "by more": 0}, 0.0, ())
    assert not arm.has_errors


def test_a_token_of_probability_0_is_an_error_and_ends_no_bet() -> None:
    """Under top-k of 4 some tokens are outside, each with its distance in logits to what is kept."""
    params, rounds, contexts = replace(PARAMS, top_k=4), two_rounds(), Contexts()
    arm, oracle = arm_of(params, 60, contexts=contexts), Oracle(rounds, 4, has_draft=True)
    sums = observed(arm, rounds, contexts)
    found, num_outside = arm.findings(), int((oracle.facts.prob == 0).sum())
    assert num_outside > 2
    assert sums == pytest.approx(oracle.sums(), abs=1e-9)
    assert_found_as_by(oracle, found, 60)
    assert (found.p_value, found.p_values["support"]) == (0, 0)
    assert found.num_outside == {"by rounding": 0, "by more": num_outside}
    assert len(found.errors) == num_outside
    request, place = divmod(int((oracle.facts.prob == 0).argmax()), 12)
    row, token = TARGET.table[*[0, *oracle.texts[12 * request + place][0]][-2:]].log(), oracle.outputs[request][place]
    gap = float(row.topk(4).values[-1] - row[token])
    assert found.errors[0] == (
        f"output of prompt {request} with seed {2 * request}: token {token} at position {place} has probability 0 "
        f"under the reference, {gap:.3g} logits from being allowed"
    )


def test_a_single_token_has_a_surprise() -> None:
    """However small the variance of its distribution."""
    arm, answered = arm_of(PARAMS, 1), answers([[3]])
    arm.observe(answered, 1)
    oracle = Oracle([answered], 0, has_draft=True)
    assert 0 < oracle.facts.variance[0] < 1
    assert arm.findings().surprise_z == pytest.approx(oracle.surprise_z(1))


# -- greedy decoding -------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=3)
SMALL = [[0], [1], [2]]  # prompts of four tokens' vocabulary
HALVES = torch.tensor([0.5, 0.25, 0.25 - 2**-20, 2**-20], dtype=torch.float64).expand(4, 4, 4)


def greedy_arm(logit_noise: float, num_draws: int = 100) -> Arm:
    model = MarkovModel(HALVES)
    limits = replace(LIMITS, logit_noise=logit_noise)
    return Arm(0, Reference(model, GREEDY), Reference(model, GREEDY), num_draws, 0, limits, Contexts())


def test_greedy_outputs_are_compared_with_the_argmax() -> None:
    arm = greedy_arm(logit_noise=0.5)
    sums = arm.observe(answers([[0, 0, 0], [0, 1, 0], [0, 0, 3]], prompts=SMALL), 3)
    found = arm.findings()
    assert sums.tolist() == [[0], [1], [1]]
    assert (arm.names, arm.num_tests, arm.level) == ([], 1, 0.01)
    assert (found.p_values, found.p_value) == ({"equality": 0}, 0)
    assert (found.shifts, found.found_after, found.surprise_z) == ({}, {}, None)
    assert found.num_outside == {"by rounding": 0, "by more": 2}
    assert [error.rpartition(" under the reference, ")[2] for error in found.errors] == [
        f"{gap:.3g} logits from being allowed" for gap in (math.log(2), math.log(2**19))
    ]
    same = greedy_arm(0.5)
    same.observe(answers([[0, 0, 0]] * 3, prompts=SMALL), 3)
    same.observe(answers([[0, 0, 0]] * 3, first_seed=6, prompts=SMALL), 3)  # repeats are what greedy decoding does
    assert (same.findings().p_values, same.findings().p_value, same.has_errors) == ({"equality": 1}, 1, False)


def test_a_gap_up_to_the_noise_is_rounding() -> None:
    """The largest gap is that of tokens which are put down to rounding."""
    exact = float(HALVES[0, 0, 0].log() - HALVES[0, 0, 1].log())
    arm = greedy_arm(logit_noise=exact)
    arm.observe(answers([[0, 1, 0], [0, 2, 0], [1, 0, 0]], prompts=SMALL), 3)
    found = arm.findings()
    assert found.num_outside == {"by rounding": 2, "by more": 1}
    assert found.largest_gap == exact
    assert (len(found.errors), arm.has_errors, found.p_value) == (1, True, 0)
    arm = greedy_arm(logit_noise=math.nextafter(exact, 0))
    arm.observe(answers([[0, 1, 0]], prompts=SMALL), 3)
    assert arm.findings().num_outside == {"by rounding": 0, "by more": 1}
    assert arm.findings().largest_gap == 0
    arm = greedy_arm(logit_noise=1.0)
    arm.observe(answers([[2, 1, 0]], prompts=SMALL), 3)  # the smaller gap comes last
    assert arm.findings().largest_gap == pytest.approx(-math.log(0.5 - 2**-19))
    assert (arm.findings().p_values, arm.findings().p_value) == ({"equality": 1}, 1)


# -- what is wrong with outputs, whatever their distribution -----------------------------------------------------


@pytest.mark.parametrize(
    ("output", "end", "rule"),
    [
        ([0, 0, 0], None, ""),
        ([0, 3], None, ""),
        ([3], None, ""),
        ([0, 0, 3], None, ""),
        ([0, 0], 3, "max_tokens=3"),
        ([0, 0, 0, 0], 3, "max_tokens=3"),
        ([0, 0, 0, 3], 3, "max_tokens=3"),
        ([0, 3, 0], 2, "stop token 3 at 1"),
        ([3, 3], 1, "stop token 3 at 0"),
        ([0, 0, 3, 0], 3, "stop token 3 at 2"),
    ],
)
def test_outputs_end_at_their_first_stop_token_or_their_limit(output: list[int], end: int | None, rule: str) -> None:
    params = SamplingParams(max_tokens=3, stop_token_ids=(3,))
    arm = Arm(0, Reference(MarkovModel(HALVES), params), None, 100, 0, LIMITS, Contexts())
    arm.observe(answers([output], first_seed=7), 3)
    message = f"output of prompt 0 with seed 7 has {len(output)} tokens but must end after {end} ({rule})"
    assert arm.findings().errors == (() if end is None else (message,))


def test_a_long_output_may_have_its_full_length() -> None:
    arm = greedy_arm(logit_noise=0)
    arm.observe(answers([[0] * 300], prompts=SMALL), 300)
    assert not arm.has_errors


def test_an_empty_output_is_no_evidence() -> None:
    """Its round is left out; its prompt and seed are reported, and an arm without evidence has no intervals."""
    arm = arm_of(PARAMS, 100)
    sums = arm.observe(answers([[], [1] * 12], first_seed=3), 12)
    assert sums.tolist() == np.zeros((2, arm.num_statistics)).tolist()
    found = arm.findings()
    assert found.errors == ("output of prompt 0 with seed 3 has 0 tokens but must end after 12 (max_tokens=12)",)
    assert (found.num_draws, found.num_outputs, found.seeds) == (0, 2, (3, 5))
    assert (found.shifts, found.p_value, found.surprise_z) == ({}, 1.0, None)
    assert found.p_values == dict.fromkeys([*INSTRUMENTS, "support"], 1.0)


def test_an_arm_that_saw_nothing_has_no_seeds() -> None:
    assert arm_of(PARAMS, 100).findings().seeds == (0, 0)


@pytest.mark.parametrize("token", [-1, 8])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    arm = arm_of(PARAMS, 100)
    with pytest.raises(
        ValueError, match=rf"prompt 1 with seed 2: token {token} at position 2 must be below the .* of 8"
    ):
        arm.observe(answers([[0, 7], [1, 2, token]]), 12)
    assert not arm.has_errors


def test_twenty_errors_are_listed_and_the_rest_counted() -> None:
    for count, hidden in ((20, ()), (21, ("and 1 more",)), (23, ("and 3 more",))):
        arm = greedy_arm(logit_noise=0)
        arm.observe(answers([[0, 0]] * count, prompts=SMALL * 10), 3)
        assert len(arm.findings().errors) == 20 + len(hidden)
        assert arm.findings().errors[20:] == hidden


# -- repeated outputs --------------------------------------------------------------------------------------------


def repeated(*rounds: tuple[Answers, list[float]]) -> list[str]:
    repeats = _Repeats(log_alpha=math.log(0.01))
    return [error for answered, log_probs in rounds for error in repeats.check(answered, np.array(log_probs))]


def test_a_repeated_output_is_an_error_if_it_is_improbable_enough() -> None:
    """The k-th after the first is below alpha / (k^2 (k + 1)): it could repeat any of k others."""
    first, again = answers([[1], [2], [1]]), answers([[3], [2], [1]], first_seed=6)
    for k, seed, place, earlier in ((4, 8, 1, 2), (5, 10, 2, 4)):
        threshold = math.log(0.01) - math.log(k * k * (k + 1))
        quiet = [0.0] * 3
        below = [threshold - 1e-9 if index == place else 0.0 for index in range(3)]
        (error,) = repeated((first, quiet), (again, below))
        assert error == (
            f"output of prompt {place} with seed {seed} repeats the one with seed {earlier}, which has probability "
            f"e^{threshold:.0f}; different seeds must give independent outputs"
        )
        assert repeated((first, quiet), (again, [threshold if index == place else 0.0 for index in range(3)])) == []


def test_an_output_of_another_prompt_is_no_repeat() -> None:
    """The same output for prompts 0 and 2, then for 0 again, which names the last seed."""
    quiet, low = [0.0] * 3, [-99.0] * 3
    assert repeated((answers([[1], [2], [1]]), low)) == []
    once = answers([[1]])
    assert repeated((once, low), (replace(once, seeds=[9]), quiet), (replace(once, seeds=[11]), low)) == [
        "output of prompt 0 with seed 11 repeats the one with seed 9, which has probability e^-99; different seeds "
        "must give independent outputs"
    ]


def test_the_second_output_may_repeat_the_first() -> None:
    threshold = math.log(0.01) - math.log(1 * 1 * 2)
    once = answers([[1]])
    assert len(repeated((once, [0.0]), (once, [threshold - 1e-9]))) == 1
    assert repeated((once, [0.0]), (once, [threshold])) == []


def test_an_arm_knows_the_probability_of_what_is_repeated() -> None:
    """Twelve tokens by chance twice: improbable. Its logarithm is the sum over the output's tokens."""
    output = ToyEngine(PARAMS).plain(PROMPTS[:1], [0], 12)[0]
    arm, oracle = arm_of(PARAMS, 100), Oracle([answers([output])], 0, has_draft=True)
    arm.observe(answers([output]), 12)
    arm.observe(answers([output], first_seed=2), 12)
    log_prob = float(np.log(oracle.facts.prob).sum())
    assert f"seed 2 repeats the one with seed 0, which has probability e^{log_prob:.0f};" in arm.findings().errors[0]
    assert arm._repeats.log_alpha == math.log(arm.level)
