"""Counters and formulas against values computed by hand."""

from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.stats import (
    AcceptanceCounts,
    PhaseTimes,
    RunTotals,
    attribute_speedup,
    expected_length,
    expected_speedup,
    least_variance_rates,
    predicted_speedup,
    predicted_speedups,
)


def counted(*steps: tuple[int, int, int]) -> AcceptanceCounts:
    counts = AcceptanceCounts()
    for step in steps:
        counts.add_step(*step)
    return counts


def test_rates_of_a_hand_computed_run() -> None:
    """Three steps of gamma 3: all, one and none accepted; and one of gamma 1 whose last token was cut."""
    counts = counted((3, 3, 4), (3, 1, 2), (3, 0, 1), (1, 1, 1))
    assert counts.acceptance_rate == 5 / 10
    assert counts.acceptance_rate_at == [3 / 4, 1 / 4, 1 / 4]
    assert counts.mean_acceptance_length == 8 / 4
    assert counts.system_efficiency == 8 / 14


def test_conditional_rates_and_histogram_of_a_hand_computed_run() -> None:
    """Of five steps with up to three drafts, four accept the first, two the second as well, and one all three."""
    counts = counted((3, 3, 4), (3, 2, 3), (3, 1, 2), (2, 1, 2), (3, 0, 1))
    assert counts.conditional_acceptance_rate_at == [4 / 5, 2 / 4, 1 / 2]
    assert counts.acceptance_histogram == [1, 2, 1, 1]
    never = counted((2, 0, 1), (2, 0, 1))
    assert never.conditional_acceptance_rate_at == [0.0, None]
    assert never.acceptance_histogram == [2, 0, 0]
    assert AcceptanceCounts().acceptance_histogram == [0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_histogram_counts_every_step(steps: list[tuple[int, int]]) -> None:
    """Also of drafts of different lengths: it is what counting step by step gives."""
    accepted = [min(pair) for pair in steps]
    counts = counted(*((max(pair), min(pair), min(pair) + 1) for pair in steps))
    longest = max(map(max, steps), default=0)
    assert counts.acceptance_histogram == [accepted.count(number) for number in range(longest + 1)]


def test_nothing_drafted_is_not_a_rate_of_zero() -> None:
    assert AcceptanceCounts().acceptance_rate is None
    assert AcceptanceCounts().mean_acceptance_length is None
    plain = counted((0, 0, 1), (0, 0, 1))
    assert (plain.acceptance_rate, plain.mean_acceptance_length, plain.system_efficiency) == (None, 1.0, 1.0)


def test_total_is_as_if_counted_together() -> None:
    steps = [(3, 3, 4), (1, 0, 1), (5, 2, 3)]
    assert AcceptanceCounts.total(counted(step) for step in steps) == counted(*steps)


@pytest.mark.parametrize("step", [(2, 3, 4), (2, -1, 0), (2, 1, 3), (2, 1, 0)])
def test_contradictions_are_refused(step: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"num_accepted=.* must lie in \[0, num_drafted=2\]"):
        counted(step)


@given(st.floats(0, 1), st.integers(0, 8))
def test_expected_length_is_the_sum_of_its_series(rate: float, gamma: int) -> None:
    assert expected_length(rate, gamma) == pytest.approx(sum(rate**i for i in range(gamma + 1)), rel=1e-6)


def test_expected_length_at_the_ends() -> None:
    """Where the closed form is 0/0, and where nothing is accepted."""
    assert [expected_length(rate, 4) for rate in (0, 1)] == [1, 5]


def test_a_tree_has_slots_and_positions_by_level() -> None:
    """Six nodes on three levels, of which two are accepted; a tree has no more levels than nodes."""
    counts = AcceptanceCounts()
    counts.add_step(6, 2, 3, depth=3)
    assert astuple(counts) == (1, 6, 2, 3, 4, [1, 1, 0])
    with pytest.raises(ValueError, match=r"num_drafted=2\] and, for a tree, in \[0, depth=3\]"):
        counts.add_step(2, 1, 2, depth=3)


def test_expected_length_by_simulation() -> None:
    """Independent coins: the mean over 200,000 steps, within six standard errors."""
    passed = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    lengths = passed.long().cumprod(1).sum(1) + 1.0
    assert abs(lengths.mean().item() - expected_length(0.7, 4)) < 6 * lengths.std().item() / 200_000**0.5


@pytest.mark.parametrize(
    ("length", "rates"),
    [(1, (0, 0, 0)), (1.25, (0.25, 0, 0)), (2, (1, 0, 0)), (2.75, (1, 0.75, 0)), (3.5, (1, 1, 0.5)), (4, (1, 1, 1))],
)
def test_rates_of_least_variance_by_hand(length: float, rates: tuple[float, ...]) -> None:
    """Whole positions are always accepted, and the next one with the fraction."""
    assert least_variance_rates(length, 3) == rates


@pytest.mark.parametrize("length", [0.5, 0.99, 4.01, 5])
def test_a_length_beyond_its_draft_is_refused(length: float) -> None:
    with pytest.raises(ValueError, match=rf"length={length} must lie in \[1, num_speculative_tokens \+ 1\] = \[1, 4\]"):
        least_variance_rates(length, 3)


def test_published_speedup_of_leviathan_et_al() -> None:
    """Their table 1: alpha 0.8, gamma 5, c 0: 3.69 times fewer target calls."""
    assert expected_speedup(0.8, 5, 0.0) == pytest.approx(3.69, abs=0.005)
    assert expected_speedup(0.8, 5, 0.1) == pytest.approx(3.69 / 1.5, abs=0.005)  # five draft steps cost half a step


def test_predicted_speedup() -> None:
    """1.75 tokens a step; a step of 10 + 30 + 1 ms against 30 ms."""
    prediction = predicted_speedup([0.5, 0.25], step_s=0.030, draft_s=0.010, scoring_s=0.030, verification_s=0.001)
    assert prediction == pytest.approx(1.75 * 30 / 41)
    for impossible in (0, -1):
        with pytest.raises(ValueError, match=rf"step_s={impossible} and .* must be > 0"):
            predicted_speedup([], step_s=impossible, draft_s=0, scoring_s=1, verification_s=0)
        with pytest.raises(ValueError, match=rf"step_s=1 and .*={impossible} must be > 0"):
            predicted_speedup([], step_s=1, draft_s=0, scoring_s=impossible, verification_s=0)


@pytest.mark.parametrize("rate", [-0.5, 1.2])
def test_an_impossible_acceptance_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"acceptance_rate={rate} must lie in \[0, 1\]"):
        expected_length(rate, 3)


def test_bookkeeping_is_the_time_outside_all_phases() -> None:
    assert astuple(PhaseTimes()) == (0.0,) * 6
    times = PhaseTimes(prefill_s=1.0, draft_s=2.0, scoring_s=4.0, verification_s=8.0, total_s=31.0)
    assert times.bookkeeping_s == 16.0


# two prompts: a prefill of 1 s in all, then 4 steps of 0.25 s and 0.5 s of bookkeeping for 8 tokens
PLAIN = RunTotals(counted(*[(0, 0, 1)] * 8), PhaseTimes(1.0, 0.0, 1.5, 0.5, 3.5), 10)


def test_each_part_of_a_speedup_is_the_effect_of_one_change() -> None:
    """Four steps of 0.5 s emit 10 of the 12 tokens that they decided about, in 2.5 s with the bookkeeping."""
    counts = counted((3, 3, 4), (3, 1, 2), (3, 3, 3), (3, 1, 1))
    run = RunTotals(counts, PhaseTimes(1.0, 0.25, 1.5, 0.25, 3.5), 12)
    parts = attribute_speedup(1.5, 1.5, run, PLAIN)
    # steps 2 s / 8 over 2 s / 10; with bookkeeping 2.5 s / 8 over 2.5 s / 10; with the prefill 3.5 s / 10 over 3.5 / 12
    assert astuple(parts) == pytest.approx((1.5, 1.25 - 1.5, 1.25 - 1.25, 1.2 - 1.25, 1.5 - 1.2))


def test_only_bookkeeping_of_one_run_is_bookkeeping() -> None:
    """Half as many steps as plain decoding, each as long, but with twice the bookkeeping."""
    run = RunTotals(counted(*[(1, 1, 2)] * 4), PhaseTimes(1.0, 0.0, 0.75, 0.25, 3.0), 10)
    parts = attribute_speedup(1.25, 2.0, run, PLAIN)
    assert astuple(parts) == pytest.approx((2.0, 0.0, 1.25 - 2.0, 3.5 / 3 - 1.25, 1.25 - 3.5 / 3))


@given(st.lists(st.floats(0.01, 10), min_size=12, max_size=12), st.floats(0.1, 10))
def test_the_parts_add_up_to_the_measured_speedup(times: list[float], measured: float) -> None:
    run, plain = (
        RunTotals(counts, PhaseTimes(*spent[:4], total_s=sum(spent)), 9)
        for counts, spent in ((counted((2, 1, 2), (2, 2, 3)), times[:6]), (counted((0, 0, 1)), times[6:]))
    )
    assert sum(astuple(attribute_speedup(measured, 2.0, run, plain))) == pytest.approx(measured, abs=1e-9)


def test_predicted_speedups_of_every_gamma() -> None:
    """A step that drafts two tokens costs 1.2 plain steps, one that drafts four 1.8; 1, 1.5, 1.75 ... tokens each."""
    rates = [0.5, 0.25, 0.125, 0.0]
    predicted = predicted_speedups(rates, 1.0, [(4.0, 1.8), (2.0, 1.2)])
    assert predicted == pytest.approx([1.0, 1.5 / 1.1, 1.75 / 1.2, 1.875 / 1.5, 1.875 / 1.8])


def test_a_proposer_that_has_a_guess_in_half_of_the_steps_costs_half() -> None:
    assert predicted_speedups([0.5, 0.5], 0.5, [(1.0, 1.4)]) == pytest.approx([1.0, 1.5 / 1.2, 2 / 1.4])


def test_impossible_costs_are_refused() -> None:
    for share in (-0.5, 0, 1.5):
        with pytest.raises(ValueError, match=rf"drafted_share={share} must lie in \(0, 1\]"):
            predicted_speedups([0.5], share, [(1.0, 1.0)])
    for costs in ([], [(0.0, 1.0)], [(1.0, 0.0)], [(1.0, -1.0)]):
        with pytest.raises(ValueError, match=r"step_costs=\[.*\] must be at least one pair of numbers > 0"):
            predicted_speedups([0.5], 1.0, costs)
