"""Counters and formulas against tables worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.stats import AcceptanceCounts, expected_length, expected_speedup, predicted_speedup


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


def test_expected_length_by_simulation() -> None:
    """Independent coins: the mean over 200,000 steps, within six standard errors."""
    passed = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(1)) < 0.7
    lengths = passed.long().cumprod(1).sum(1) + 1.0
    assert abs(lengths.mean().item() - expected_length(0.7, 4)) < 6 * lengths.std().item() / 200_000**0.5


def test_published_speedup_of_leviathan_et_al() -> None:
    """Their table 1: alpha 0.8, gamma 5, c 0: 3.69 times fewer target calls."""
    assert expected_speedup(0.8, 5, 0.0) == pytest.approx(3.69, abs=0.005)


def test_predicted_speedup() -> None:
    """1.75 tokens a step; a step of 10 + 30 + 1 ms against 30 ms."""
    prediction = predicted_speedup([0.5, 0.25], step_s=0.030, draft_s=0.010, scoring_s=0.030, verification_s=0.001)
    assert prediction == pytest.approx(1.75 * 30 / 41)
    with pytest.raises(ValueError, match=r"step_s=0 and .* must be > 0"):
        predicted_speedup([], step_s=0, draft_s=0, scoring_s=1, verification_s=0)
    with pytest.raises(ValueError, match=r"acceptance_rate=1.2 must lie in \[0, 1\]"):
        expected_length(1.2, 3)
