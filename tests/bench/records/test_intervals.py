"""Bootstrap intervals of speed-ups, rates and differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.records.intervals import (
    BootstrapInterval,
    geometric_mean_interval,
    mean_difference_interval,
    rate_interval,
    unpaired_ratio_interval,
)


def test_equal_ratios_leave_no_doubt() -> None:
    interval = geometric_mean_interval([1.5] * 6)
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([1.5] * 3)


def test_two_observations_reach_from_one_to_the_other() -> None:
    interval = geometric_mean_interval([1.0, 4.0])  # a quarter of the resamples is twice the same one
    assert [interval.estimate, interval.low, interval.high] == pytest.approx([2.0, 1.0, 4.0])


def test_the_inverse_has_the_inverse_interval() -> None:
    ratios = [1.1, 1.3, 0.9, 1.6, 1.2, 1.4]
    interval, inverse = geometric_mean_interval(ratios), geometric_mean_interval([1 / ratio for ratio in ratios])
    assert interval.low is not None
    assert interval.high is not None
    assert inverse.estimate == pytest.approx(1 / interval.estimate)
    assert inverse.low == pytest.approx(1 / interval.high)
    assert inverse.high == pytest.approx(1 / interval.low)


def test_many_observations_agree_with_the_normal_interval() -> None:
    logs = np.random.default_rng(1).normal(0.3, 0.2, 400)
    interval = geometric_mean_interval(np.exp(logs).tolist())
    radius = 1.96 * logs.std() / math.sqrt(len(logs))
    assert interval.low is not None
    assert interval.high is not None
    assert math.log(interval.low) == pytest.approx(logs.mean() - radius, abs=0.05 * radius)
    assert math.log(interval.high) == pytest.approx(logs.mean() + radius, abs=0.05 * radius)


def test_one_observation_has_no_interval() -> None:
    interval = geometric_mean_interval([1.2])
    assert (interval.estimate, interval.low, interval.high) == (1.2, None, None)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [1.0, -2.0], [math.nan], [math.inf]])
def test_ratios_must_be_positive(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite, > 0 and at least one"):
        geometric_mean_interval(ratios)


def test_a_rate_is_a_ratio_of_sums() -> None:
    """Two prompts: a resample is one of them twice (a quarter each), or both."""
    assert rate_interval([1, 9], [10, 30]) == BootstrapInterval(10 / 40, 1 / 10, 9 / 30)
    assert rate_interval([3], [10]) == BootstrapInterval(0.3, None, None)


def test_prompts_without_a_draft_tell_nothing_of_the_rate() -> None:
    assert rate_interval([0, 0], [0, 0]) is None
    assert rate_interval([5, 0, 0], [10, 0, 0]) == BootstrapInterval(0.5, 0.5, 0.5)


def test_the_interval_of_a_rate_agrees_with_the_normal_one() -> None:
    """Independent tokens, 20 of each of 300 prompts."""
    accepted = np.random.default_rng(1).binomial(20, 0.3, 300).tolist()
    interval = rate_interval(accepted, [20] * 300)
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    radius = 1.96 * math.sqrt(0.3 * 0.7 / 6000)
    assert interval.low == pytest.approx(interval.estimate - radius, abs=0.15 * radius)
    assert interval.high == pytest.approx(interval.estimate + radius, abs=0.15 * radius)


def test_resamples_with_a_single_token_count() -> None:
    """Of 100 prompts, one has 1 token, not accepted, and three have 5, accepted; a rate of 0 comes of resamples without
    the three, but with the one. They are 3.1 % of those with a token, 1.3 % if a single token does not count.
    """
    interval = rate_interval([0, 5, 5, 5] + [0] * 96, [1, 5, 5, 5] + [0] * 96)
    assert interval == BootstrapInterval(15 / 16, 0.0, 1.0)


@pytest.mark.parametrize(("accepted", "drafted"), [([1, 2], [3]), ([1], [2, 3])])
def test_counts_of_other_prompts_are_refused(accepted: list[int], drafted: list[int]) -> None:
    message = f"{len(accepted)} numerators must be as many as the denominators, {len(drafted)}"
    with pytest.raises(ValueError, match=message):
        rate_interval(accepted, drafted)


def test_unpaired_ratios_have_an_interval() -> None:
    found = unpaired_ratio_interval([8.0] * 4, [2.0] * 3)
    assert [found.estimate, found.low, found.high] == pytest.approx([4.0, 4.0, 4.0])
    assert unpaired_ratio_interval([8.0], [2.0]) == BootstrapInterval(pytest.approx(4.0), None, None)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_unpaired_values_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match=rf"values=\[{value}\] must be finite, > 0"):
        unpaired_ratio_interval([1.0], [value])


def test_a_difference_is_paired() -> None:
    """Prompt by prompt the difference is always 0.5, however far the prompts are apart."""
    interval = mean_difference_interval([0.5, 1.0, 0.5, 1.0], [0.0, 0.5, 0.0, 0.5])
    assert interval == BootstrapInterval(0.5, 0.5, 0.5)
    # of 4 draws 0, 1, 2, 3 or 4 are the first prompt's, with chances .316, .422, .211, .047, .004
    assert mean_difference_interval([1, 0, 1, 1], [0, 0, 1, 1]) == BootstrapInterval(0.25, 0, 0.75)
    assert mean_difference_interval([3.0, 5.0], [2.0, 1.0]) == BootstrapInterval(2.5, 1.0, 4.0)
    assert mean_difference_interval([3.0], [1.0]) == BootstrapInterval(2.0, None, None)


@pytest.mark.parametrize(("values", "others"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])])
def test_differences_need_pairs(values: list[float], others: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(values)} and {len(others)} values must be pairs, at least one"):
        mean_difference_interval(values, others)


def test_every_run_draws_the_same_resamples() -> None:
    """An interval in a committed result can be computed again: 10,000 resamples of NumPy's PCG64 with seed 0."""
    ratios, times = [1.1, 1.3, 0.9, 1.6, 1.2, 1.4], [1.6, 1.2, 1.4, 1.0]
    intervals = [
        geometric_mean_interval(ratios),
        unpaired_ratio_interval(ratios, times),
        rate_interval([1, 5, 0, 3, 4, 2], [4, 6, 3, 3, 5, 5]),
        mean_difference_interval([1.25, 0.5, -0.375, 2.0, 0.8125, -1.5, 3.1], [0.0] * 7),
    ]
    ends = [(interval.low, interval.high) for interval in intervals if interval]
    assert ends == [
        pytest.approx((1.0531871754796613, 1.4200512011415165)),
        pytest.approx((0.7667020796582197, 1.2017066925909123)),
        pytest.approx((7 / 23, 0.8)),
        pytest.approx((-0.1875, 1.842857142857143)),
    ]
