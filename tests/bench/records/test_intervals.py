"""The bootstrap interval of a speed-up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.records.intervals import BootstrapInterval, geometric_mean_interval, rate_interval


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
    assert math.log(interval.low) == pytest.approx(logs.mean() - radius, abs=0.1 * radius)
    assert math.log(interval.high) == pytest.approx(logs.mean() + radius, abs=0.1 * radius)


def test_one_observation_has_no_interval() -> None:
    interval = geometric_mean_interval([1.2])
    assert (interval.estimate, interval.low, interval.high) == (1.2, None, None)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [math.nan], [math.inf]])
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


def test_counts_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 numerators must be as many as the denominators, 1"):
        rate_interval([1, 2], [3])
