"""Tests of drift: hand-computed values, the false-alarm rate on data without drift, and drifts that must be found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.records.trends import Drift, drift_over_time, drift_within

NUM_RUNS = 1000


def test_a_slope_within_texts_by_hand() -> None:
    """Steps of 1, 2, 3 and 3, 4, 5 tokens: slope 1 each. Of the four choices of signs two are as extreme."""
    assert drift_within([[1, 2, 3], [3, 4, 5]]) == Drift(1.0, 0.5)
    # place times tokens: 2 and -1, over squares of 2 and 2; sums with signs: 1, 3, -3, -1
    assert drift_within([[1, 4, 3], [3, 2, 2]]) == Drift(1 / 4, 1.0)
    assert drift_within([[1, 2, 3]] * 8) == Drift(1.0, 2 / 256)


def test_without_slopes_there_is_no_test() -> None:
    assert drift_within([]) is None
    assert drift_within([[2, 2, 2], [3, 1, 3], [4], []]) is None


def test_a_slope_over_time_by_hand() -> None:
    """Requests of 2, 4 and 6 steps at 0, 1 and 2 s that emit 1, 2 and 3 tokens a step: mean 28/12, weighted time 16/12.

    Excess tokens are 2 - 14/3, 8 - 28/3 and 18 - 14; with the times they give 8 - 4/3.
    """
    found = drift_over_time([0.0, 1.0, 2.0], [2, 8, 18], [2, 4, 6])
    assert found is not None
    squares = 2 * (4 / 3) ** 2 + 4 * (1 / 3) ** 2 + 6 * (2 / 3) ** 2
    assert found.slope == pytest.approx((8 - 4 / 3) / squares)
    # of the six orders of the excesses -8/3, -4/3 and 4, this one and its reverse reach 20/3 and -20/3
    assert found.p_value == pytest.approx(1 / 3, abs=5 * math.sqrt(2 / 9 / 9999))


def test_equal_requests_have_no_drift() -> None:
    assert drift_over_time([0.0, 1.0], [2, 8], [2, 4]) is None
    assert drift_over_time([0.0, 1.0, 2.0], [4, 6, 8], [2, 3, 4]) is None
    assert drift_over_time([1.0, 1.0, 1.0], [4, 9, 8], [2, 3, 4]) is None
    assert drift_over_time([1.0, 2.0, 3.0], [0, 0, 0], [0, 0, 0]) is None


def texts(random: np.random.Generator, number: int, fall: float = 0.0) -> list[list[int]]:
    """Tokens of up to 40 steps of 4 drafts. Acceptance differs by text, steps resemble the ones before (a hidden state
    with two rates), and it falls from the first step to the fortieth by `fall`.
    """
    found = []
    for _ in range(number):
        state = (random.random(40) < 0.2).cumsum() % 2  # switches every five steps on average
        rate = random.beta(8, 4) * np.where(state, 0.6, 1.0) - fall * np.arange(40) / 40
        passed = random.random((40, 4)) < rate[:, None]
        found.append((1 + passed.cumprod(1).sum(1))[: random.integers(10, 41)].tolist())
    return found


@pytest.mark.parametrize("number", [8, 20])
def test_false_alarms_within_texts_are_as_rare_as_declared(number: int) -> None:
    """Steps that resemble their neighbors, in texts that differ: 5 % and 1 % of runs look like a drift, no more."""
    random = np.random.default_rng(3)
    p_values = np.array([found.p_value for _ in range(NUM_RUNS) if (found := drift_within(texts(random, number)))])
    for level in (0.05, 0.01):
        assert (p_values <= level).mean() <= level + 5 * math.sqrt(level * (1 - level) / NUM_RUNS)
    assert (p_values <= 0.05).mean() > 0.02  # and the test is not blind


def test_drift_within_texts_is_found() -> None:
    random = np.random.default_rng(4)
    drifts = [drift_within(texts(random, 20, fall=0.4)) for _ in range(100)]
    assert all(found is not None for found in drifts)
    assert sum(found.p_value <= 0.01 for found in drifts if found) > 90
    assert all(found.slope < 0 for found in drifts if found and found.p_value <= 0.01)


def requests(random: np.random.Generator, fall: float = 0.0) -> Drift | None:
    """Forty requests in ten minutes, whose acceptance differs and falls by `fall` from the first to the last."""
    times = np.sort(random.random(40)) * 600
    steps = random.integers(5, 60, 40)
    rate = random.beta(8, 4, 40) - fall * times / 600
    emitted = [int((1 + (random.random((n, 4)) < r).cumprod(1).sum(1)).sum()) for n, r in zip(steps, rate, strict=True)]
    return drift_over_time(times.tolist(), emitted, steps.tolist())


def test_false_alarms_over_time_are_as_rare_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.records.trends.NUM_DRAWS", 399)  # exact with any number, as the data are counted
    random = np.random.default_rng(5)
    p_values = np.array([found.p_value for _ in range(NUM_RUNS) if (found := requests(random))])
    for level in (0.05, 0.01):
        assert (p_values <= level).mean() <= level + 5 * math.sqrt(level * (1 - level) / NUM_RUNS)
    assert (p_values <= 0.05).mean() > 0.02


def test_drift_over_time_is_found() -> None:
    """Acceptance that falls from 0.67 to 0.27 within ten minutes."""
    random = np.random.default_rng(6)
    drifts = [requests(random, fall=0.4) for _ in range(20)]
    assert sum(found is not None and found.p_value <= 0.01 and found.slope < 0 for found in drifts) > 17


def test_turns_of_a_conversation_change_their_signs_together() -> None:
    """Three texts that each rise by one token: as three prompts 2 of 8 choices of signs are as far from zero, as a
    conversation of two and one alone 2 of 4.
    """
    texts = [[1, 2]] * 3
    assert drift_within(texts) == Drift(1.0, 2 / 8)
    assert drift_within(texts, [5, 5, 0]) == Drift(1.0, 2 / 4)
    assert drift_within(texts, [0, 1, 2]) == drift_within(texts)
