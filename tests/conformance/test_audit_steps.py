"""The steps of an audit by hand: which requests it makes, what it believes of counters, and when it stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.audited import DRAFT, PROMPTS, TARGET, ToyEngine

from specdec import SamplingParams
from specdec.conformance import audit as audits
from specdec.conformance import mutants
from specdec.conformance.arms import Answers, Arm
from specdec.conformance.audit import SEED_STRIDE, DraftCounters, audit
from specdec.conformance.certificate import Speculation
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import Exchangeability, Wealth
from specdec.conformance.statistics.contexts import Contexts
from specdec.conformance.verdicts import AuditLimits, bounds

PARAMS = SamplingParams(max_tokens=4)
ROUGH = AuditLimits(max_tv=0.9)


# -- counters --------------------------------------------------------------------------------------------------

Counts = tuple[object, object]


def counted(*counts: Counts) -> Speculation | None:
    """What an engine with these counts is believed to have done; the first are those before the audit."""
    engine = SimpleNamespace()
    engine.num_drafted, engine.num_accepted = counts[0]
    counters = DraftCounters(engine)
    for engine.num_drafted, engine.num_accepted in counts[1:]:
        counters.read()
    return counters.speculation()


@pytest.mark.parametrize(
    ("counts", "drafted", "accepted"),
    [
        ([(0, 0), (10, 5)], 10, 5),
        ([(5, 4), (99, 40), (99, 40), (120, 40)], 115, 36),  # none in between
        ([(0, 0), (10, 10)], 10, 10),
        ([(7, 3), (7, 3)], 0, 0),
        ([(7, 3)], 0, 0),
    ],
    ids=str,
)
def test_counts_are_those_since_the_start(counts: list[Counts], drafted: int, accepted: int) -> None:
    assert counted(*counts) == Speculation(drafted, accepted)


@pytest.mark.parametrize("unknown", [(None, None), (None, 3), (3, None)])
def test_counts_that_are_never_known_are_no_counts(unknown: Counts) -> None:
    assert counted(unknown, unknown) is None
    counters = DraftCounters(object())  # without the attributes
    counters.read()
    assert counters.speculation() is None


NUMBERS = "num_drafted={} and num_accepted={} must be whole numbers, at least 0"
IN_A_PART = (
    "num_drafted and num_accepted must be known throughout an audit, but were missing in a part of it; "
    "start them at 0 and count every step"
)
FELL = (
    "{} must never decrease, but fell from {} to {}; count from the engine's start, and do not restart it during an "
    "audit"
)


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ([(5, 5), (99, 40), (60, 50)], FELL.format("num_drafted", 99, 60)),
        ([(5, 5), (99, 40), (120, 4)], FELL.format("num_accepted", 40, 4)),
        ([(5, 5), (4, 4)], FELL.format("num_drafted", 5, 4)),
        ([(0, 0), (10, 5), (None, 8), (30, 15)], IN_A_PART),
        ([(0, 0), (20, 8), (30, None)], IN_A_PART),
        ([(None, None), (10, 5), (20, 8)], IN_A_PART),
        ([(0, 0), (float("nan"), 8), (30, 9)], NUMBERS.format("nan", 8)),
        ([(0, 0), ("9", 8)], NUMBERS.format("'9'", 8)),
        ([(-1, 0), (10, 5)], NUMBERS.format(-1, 0)),
        ([(0, -1), (10, 5)], NUMBERS.format(0, -1)),
        ([(5, 5), (99, 40), (60, 50), (-1, 60), (1, 1)], FELL.format("num_drafted", 99, 60)),  # the first problem
        ([(-1, -1), (-2, 0)], NUMBERS.format(-1, -1)),
    ],
    ids=str,
)
def test_counts_that_contradict_themselves_are_a_problem(counts: list[Counts], problem: str) -> None:
    assert counted(*counts) == Speculation(0, 0, problem)


def test_more_accepted_than_drafted_tokens_are_a_problem() -> None:
    found = counted((100, 0), (110, 11))
    text = "num_accepted=11 must not exceed num_drafted=10; count the same steps in both"
    assert found == Speculation(10, 11, text)


# -- requests --------------------------------------------------------------------------------------------------


def test_prompts_are_cycled_in_batches_with_seeds_of_their_own() -> None:
    rounds = list(islice(audits._rounds(PROMPTS, 2, seed=100, once=False), 4))
    assert [list(each.numbers) for each in rounds] == [[0, 1], [2, 0], [1, 2], [0, 1]]
    assert [each.prompts for each in rounds] == [[PROMPTS[number] for number in each.numbers] for each in rounds]
    assert [each.seed for each in rounds] == [100, 104, 108, 112]
    once = list(audits._rounds(PROMPTS, 2, seed=100, once=True))
    assert [(list(each.numbers), each.seed) for each in once] == [([0, 1], 100), ([2], 104)]


def test_each_arm_asks_with_other_seeds() -> None:
    calls = []

    def generate(*arguments):
        calls.append(arguments)
        return [[1]] * 3

    questions = audits._Questions([4, 0, 2], PROMPTS, 100)
    assert questions.ask(generate, 0, 7) == Answers([4, 0, 2], PROMPTS, [100, 102, 104], [[1]] * 3)
    assert questions.ask(generate, 1, 7).seeds == [101, 103, 105]
    assert calls == [(PROMPTS, [100, 102, 104], 7), (PROMPTS, [101, 103, 105], 7)]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_each_prompt_has_an_output(count: int) -> None:
    questions = audits._Questions(range(3), PROMPTS, 0)
    with pytest.raises(ValueError, match=f"the engine returned {count} outputs but must return one per prompt, 3"):
        questions.ask(lambda *arguments: [[1]] * count, 0, 7)


class Noted(ToyEngine):
    """Notes the calls of each arm: seeds and number of tokens."""

    def __init__(self, params: SamplingParams = PARAMS, **parts) -> None:
        super().__init__(params, **parts)
        self.calls: list[tuple[str, list[int], int]] = []

    def speculative(self, prompts, seeds, max_tokens):
        self.calls.append(("speculative", seeds, max_tokens))
        return super().speculative(prompts, seeds, max_tokens)

    def plain(self, prompts, seeds, max_tokens):
        self.calls.append(("plain", seeds, max_tokens))
        return super().plain(prompts, seeds, max_tokens)


def audited(engine: Noted, num_draws: int, **options):
    reference = Reference(engine.target, engine.params)
    return audit(engine, reference, PROMPTS, num_draws=num_draws, batch_size=2, seed=1, limits=ROUGH, **options)


@pytest.mark.parametrize(("num_draws", "num_rounds"), [(16, 2), (17, 3)])
def test_an_audit_takes_as_many_rounds_as_its_tokens_need(num_draws: int, num_rounds: int) -> None:
    """Eight tokens a round, of each arm; with other seeds in each call."""
    engine = Noted()
    found = audited(engine, num_draws)
    assert [(name, tokens) for name, _, tokens in engine.calls] == [("speculative", 4), ("plain", 4)] * num_rounds
    expected = [[SEED_STRIDE + 4 * count + arm + 2 * row for row in (0, 1)] for count in range(3) for arm in (0, 1)]
    assert [seeds for _, seeds, _ in engine.calls] == expected[: 2 * num_rounds]
    assert found.speculative.num_draws == found.control.num_draws == num_draws
    assert found.speculative.seeds == (SEED_STRIDE, SEED_STRIDE + 4 * num_rounds - 2)
    assert found.control.seeds == (SEED_STRIDE + 1, SEED_STRIDE + 4 * num_rounds - 1)
    assert (found.num_drafted, found.num_accepted) == (engine.num_drafted, engine.num_accepted)
    assert found.sampling["max_tokens"] == 4
    assert (found.alpha, found.max_tv) == (ROUGH.alpha, 0.9)
    assert audited(Noted(), num_draws) == found


def test_an_audit_stops_at_an_error_of_either_arm() -> None:
    class Empty(Noted):
        def plain(self, prompts, seeds, max_tokens):
            self.calls.append(("plain", seeds, max_tokens))
            return [[]] * len(prompts)

    engine = Empty()
    found = audited(engine, 400)
    assert len(engine.calls) == 2
    assert (found.speculative.errors, len(found.control.errors)) == ((), 2)
    assert found.control.num_draws == 0


def test_the_arms_are_compared_by_the_sums_of_their_outputs() -> None:
    """Each has uniforms of its own for the transforms, and those of the audit's seed."""
    engine, reference = Noted(rule=mutants.accept_always), Reference(TARGET, PARAMS)
    contexts = Contexts()
    arms = [Arm(number, reference, None, 32, 1, ROUGH, contexts) for number in (0, 1)]
    pair = Exchangeability(arms[0].num_statistics, ROUGH.alpha)
    for asked in islice(audits._rounds(PROMPTS, 2, SEED_STRIDE, once=False), 4):
        first, second = asked.ask(engine.speculative, 0, 4), asked.ask(engine.plain, 1, 4)
        pair.observe(arms[0].observe(first, 4), arms[1].observe(second, 4))
        for each in (first, second):
            contexts.add(each.prompts, each.outputs)
    found = audited(Noted(rule=mutants.accept_always), 32)
    assert found.arms_p_value == pair.wealth.p_value < 1
    assert (found.speculative, found.control) == (arms[0].findings(), arms[1].findings())


def test_an_audit_shows_how_many_tokens_it_has_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than it was to draw, and those of the arm that has fewer."""

    class Bar:
        def __init__(self, *arguments, **options) -> None:
            self.given, self.n, self.shown = (arguments, options), 0, []
            made.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...

        def update(self, count: int) -> None:
            self.n += count
            self.shown.append(self.n)

    made: list[Bar] = []
    monkeypatch.setattr(audits, "bar", Bar)
    audited(Noted(), 20)
    audited(Noted(), 16, progress=False)
    assert [each.given for each in made] == [
        ((20, "token", "audit, of each arm"), {"shown": True}),
        ((16, "token", "audit, of each arm"), {"shown": False}),
    ]
    assert [each.shown for each in made] == [[8, 16, 20], [8, 16]]


@pytest.mark.parametrize("is_shown", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_the_duration_is_announced_to_who_sees_it(
    is_shown: bool, progress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[str] = []
    monkeypatch.setattr(audits, "announce", announced.append)
    monkeypatch.setattr(audits, "is_shown", lambda: is_shown)
    audited(Noted(), 16, progress=progress)
    assert [text.split(",")[0] for text in announced] == ["audit: 16 tokens of each arm"] * (progress and is_shown)


def test_a_greedy_audit_has_bounds_for_as_many_tokens_as_its_prompts_give() -> None:
    """Each prompt once: 12 tokens of the 400, and all 12 give the bound on the rate."""
    greedy = replace(PARAMS, temperature=0)
    engine = Noted(greedy)
    found = audited(engine, 400)
    assert len(engine.calls) == 4
    assert found.speculative.num_draws == 12
    assert found.tv_upper_bound == bounds(found.speculative, ROUGH.alpha, ROUGH, 12).tv_upper_bound < 1
    few = audited(Noted(greedy), 8)
    assert few.speculative.num_draws == 8
    assert few.tv_upper_bound == bounds(few.speculative, ROUGH.alpha, ROUGH, 8).tv_upper_bound < 1


def test_a_greedy_audit_that_stops_early_has_bounds_for_all_its_prompts() -> None:
    """Eight of the twelve tokens: a lower bound as for an audit that looks again and again, and no upper bound."""

    class Samples(Noted):
        def speculative(self, prompts, seeds, max_tokens):
            return ToyEngine(PARAMS).plain(prompts, seeds, max_tokens)

    found = audited(Samples(replace(PARAMS, temperature=0)), 400)
    assert (found.speculative.num_draws, found.tv_upper_bound) == (8, 1.0)
    assert found.speculative.errors


def test_counts_that_cannot_be_believed_are_not_reported() -> None:
    class Falls(Noted):
        def speculative(self, prompts, seeds, max_tokens):
            outputs = super().speculative(prompts, seeds, max_tokens)
            self.num_accepted = -self.num_accepted
            return outputs

    found = audited(Falls(), 16)
    assert (found.num_drafted, found.num_accepted) == (None, None)
    assert "must be whole numbers" in found.reasons[0]


# -- when it is decided ------------------------------------------------------------------------------------------

TELLING = AuditLimits(alpha=0.01)


@cache
def arm_after(num_tokens: int, temperature: float) -> Arm:
    """An arm of draws at temperature 1 that was given the plain outputs of another temperature."""
    arm = Arm(0, Reference(TARGET, SamplingParams()), Reference(DRAFT, SamplingParams()), 400, 0, TELLING, Contexts())
    outputs = ToyEngine(SamplingParams(temperature=temperature)).plain(PROMPTS, [0, 2, 4], num_tokens)
    arm.observe(Answers(range(3), PROMPTS, [0, 2, 4], outputs), num_tokens)
    return arm


def pair_with(p_value: float) -> Exchangeability:
    pair = Exchangeability(1, TELLING.alpha)
    if p_value < 1:
        pair.wealth.bet(np.full((1, 16), -np.log(p_value)))
    return pair


def decided(arms: Sequence[Arm], p_value: float) -> bool:
    return audits._is_decided(arms, pair_with(p_value), TELLING)


def test_an_audit_is_decided_by_the_speculative_arm_its_bound_and_the_difference() -> None:
    wrong, fresh, right = arm_after(100, 0.0), arm_after(12, 0.0), arm_after(100, 1.0)
    assert any(each.wealth.found_after for each in fresh.evidence)
    assert bounds(wrong.findings(), wrong.level, TELLING).tv_lower_bound > 0
    assert bounds(fresh.findings(), fresh.level, TELLING).tv_lower_bound == 0
    assert decided([wrong, right], 1e-3)
    assert not decided([fresh, right], 1e-3)  # found, but not bounded
    assert not decided([right, wrong], 1e-3)
    unfound = SimpleNamespace(
        evidence=[SimpleNamespace(wealth=Wealth(1, 0.01))], findings=wrong.findings, level=wrong.level
    )
    assert not decided([unfound, right], 1e-3)  # bounded, but found by no instrument
    assert not decided([wrong, right], 0.02)
    assert not decided([wrong, right], 1.0)


def test_a_p_value_of_alpha_decides() -> None:
    wrong, right = arm_after(100, 0.0), arm_after(100, 1.0)
    pair = pair_with(1e-3)
    equal = replace(TELLING, alpha=pair.wealth.p_value)
    assert audits._is_decided([wrong, right], pair, equal)


# -- its expected duration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1, "2 seconds"),
        (2.6, "3 seconds"),
        (119, "119 seconds"),
        (120, "2 minutes"),
        (7199, "120 minutes"),
        (7200, "2.0 hours"),
        (90_000, "25.0 hours"),
        (3_600_000, "1000.0 hours"),
    ],
)
def test_a_duration_has_the_largest_unit_of_which_there_are_two(seconds: float, text: str) -> None:
    assert audits._duration(seconds) == text


class Clocked(Noted):
    """Each call of an arm takes a second; the plain arm ends early."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(audits.time, "perf_counter", lambda: float(len(self.calls)))

    def plain(self, prompts, seeds, max_tokens):
        return super().plain(prompts, seeds, max_tokens // 2)


def test_a_duration_is_that_of_a_round_for_the_arm_that_says_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for three outputs of 4 and of 2 tokens: 6 of each arm. A round before it warms up."""
    engine = Clocked(monkeypatch)
    seconds = audits._seconds_per_token(engine, Reference(engine.target, PARAMS), PROMPTS, None)
    assert seconds == pytest.approx(2 / 6)
    half = SEED_STRIDE // 2
    expected = [[half + start + 2 * row for row in range(3)] for start in (0, 1, 6, 7)]
    assert [seeds for _, seeds, _ in engine.calls] == expected
    assert [tokens for _, _, tokens in engine.calls] == [4, 2, 4, 2]


def test_an_engine_without_any_output_is_given_a_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(Clocked):
        def speculative(self, prompts, seeds, max_tokens):
            return [[]] * len(prompts)

    assert audits._seconds_per_token(Empty(monkeypatch), Reference(TARGET, PARAMS), PROMPTS, None) == 1


def test_prompts_and_vocabularies_are_checked() -> None:
    reference = Reference(TARGET, PARAMS)
    audits._check(SimpleNamespace(vocab_size=8), reference, Reference(DRAFT, PARAMS), PROMPTS)
    audits._check(SimpleNamespace(vocab_size=None), reference, None, PROMPTS)
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts must hold at least one prompt and no empty one; pass token ids"):
            audits._check(object(), reference, None, prompts)
    for size in (7, 9):
        with pytest.raises(ValueError, match=f"the engine's vocabulary of {size} tokens must equal the reference's, 8"):
            audits._check(SimpleNamespace(vocab_size=size), reference, None, PROMPTS)
