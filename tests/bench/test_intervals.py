"""The bootstrap interval of a speed-up."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.intervals import geometric_mean_interval


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
