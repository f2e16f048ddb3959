"""Stakes, intervals and power, by hand and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specdec.conformance.statistics.betting import (
    DIRECTION_STAKES,
    GRID_SHARE,
    Exchangeability,
    Shift,
    Wealth,
    _divergence,
    _log_sum_exp,
    draws_needed,
    draws_needed_for_rate,
    min_detectable_rate,
    min_detectable_tv,
    radius,
    radius_when_stopped,
    rate_upper_bound,
)


def test_wealth_is_the_mean_of_the_products_and_the_p_value_one_over_its_peak() -> None:
    wealth = Wealth(2, level=0.5)
    assert wealth.p_value == 1
    wealth.bet(np.log([[2.0, 0.5]]))
    assert wealth.p_value == pytest.approx(1 / 1.25)
    wealth.bet(np.log([[2.0, 0.5], [0.25, 1.0]]))
    assert wealth.p_value == pytest.approx(1 / 2.125)  # the peak was after two tokens
    assert (wealth.found_after, wealth.num_steps) == (2, 3)


def test_wealth_does_not_depend_on_how_tokens_come() -> None:
    factors = np.random.default_rng(0).normal(size=(50, 3))
    whole, parts = Wealth(3, 0.01), Wealth(3, 0.01)
    whole.bet(factors)
    for part in np.array_split(factors, 7):
        parts.bet(part)
    parts.bet(factors[:0])
    assert parts.p_value == pytest.approx(whole.p_value)
    assert parts.found_after == whole.found_after


def test_an_underflowing_p_value_is_reported_as_the_smallest_float() -> None:
    wealth = Wealth(1, 0.01)
    wealth.bet(np.array([[5000.0]]))
    assert wealth.p_value == 1e-300


def test_a_wealth_of_one_over_the_level_is_found() -> None:
    wealth = Wealth(1, level=0.5)
    wealth.bet(np.log([[1.0], [2.0], [0.5]]))
    assert (wealth.found_after, wealth.p_value) == (2, pytest.approx(0.5))
    wealth.bet(np.log([[8.0]]))
    assert (wealth.found_after, wealth.num_steps) == (2, 4)  # the first time counts
    below = Wealth(1, level=0.5)
    below.bet(np.log([[2.0]]) - 1e-12)
    assert below.found_after is None


@pytest.mark.parametrize("log_peak", [1.0, 689.5])
def test_a_p_value_is_exact_down_to_the_smallest(log_peak: float) -> None:
    wealth = Wealth(1, 0.01)
    wealth.bet(np.array([[log_peak], [-1000.0]]))
    assert wealth.p_value == pytest.approx(math.exp(-log_peak))


def test_stakes_are_powers_of_two_with_both_signs() -> None:
    powers = [2.0**-k for k in range(8)]
    assert Exchangeability.STAKES.tolist() == [*powers, *(-each for each in powers)]
    assert DIRECTION_STAKES.tolist() == [*powers[:7], *(-each for each in powers[:7])]
    assert pytest.approx(0.8284271247) == GRID_SHARE


def test_a_bet_on_a_difference_is_its_exponential_over_the_cosine() -> None:
    """Two differences of the same sign win what a bet on that sign wins twice; the rest of the stakes lose."""
    differences = [[1.5, -40.0], [2.0, -30.0]]
    wealth = Exchangeability(2, 0.01)
    wealth.observe(np.array(differences) + 3, np.full((2, 2), 3.0))
    factors = [
        math.prod(2 / (1 + math.exp(-2 * stake * row[column])) for row in differences)
        for column in range(2)
        for stake in Exchangeability.STAKES
    ]
    assert wealth.wealth.p_value == pytest.approx(1 / (sum(factors) / len(factors)))
    assert wealth.wealth.num_steps == 2


def test_swapping_the_arms_costs_what_it_wins() -> None:
    """If the arms have one distribution, each difference is as likely as its negative: the mean stake is 1, exactly."""
    stakes = []
    for difference in ([3.0, -0.5], [-3.0, 0.5]):
        wealth = Exchangeability(2, 0.01)
        wealth.observe(np.array([difference]), np.zeros((1, 2)))
        stakes.append(np.exp(wealth.wealth._log_shares).sum())
    assert np.mean(stakes) == pytest.approx(1, abs=1e-12)
    assert max(stakes) == pytest.approx(1, abs=1e-12)  # a symmetric grid does not know the sign before it has seen any


def test_different_arms_are_distinguished_and_equal_arms_never_are() -> None:
    rng = np.random.default_rng(1)
    pair = Exchangeability(1, 0.01)
    pair.observe(rng.normal(1.0, 1.0, size=(200, 1)), rng.normal(0.0, 1.0, size=(200, 1)))
    assert pair.wealth.p_value < 1e-9
    same = Exchangeability(1, 0.01)
    same.observe(rng.normal(size=(200, 1)), rng.normal(size=(200, 1)))
    assert same.wealth.p_value > 1e-6  # fails falsely with probability at most 1e-6


def test_the_interval_is_azumas() -> None:
    shift = Shift(span=2.0, max_draws=4)
    shift.add(np.array([1.0, 0.0]))
    shift.add(np.array([-0.5, 0.5]))
    interval = shift.interval(alpha=4 * math.exp(-2))  # half of it, and radius sqrt(2 / 8)
    assert interval.estimate == 0.25
    assert (interval.low, interval.high) == pytest.approx((0.25 - 1.0, 0.25 + 1.0))
    assert radius(20_000, 2e-6) == pytest.approx(math.sqrt(13.815510558 / 40_000))


def test_draws_needed_by_hand() -> None:
    """14 stakes, share 0.828427: sqrt(ln(14e6) / 1.656854) = 3.151383; sqrt(ln(1e6) / 2) = 2.628261."""
    assert draws_needed(0.05, 1e-6, 1e-6) == math.ceil((5.779644 / 0.05) ** 2) == 13362
    assert min_detectable_tv(20_000, 1e-6, 1e-6) == pytest.approx(5.779644 / math.sqrt(20_000), rel=1e-6)
    assert min_detectable_tv(13362, 1e-6, 1e-6) <= 0.05 < min_detectable_tv(13361, 1e-6, 1e-6)


def test_draws_needed_for_a_rate_by_hand() -> None:
    """0.95^269 = 1.02e-6, 0.95^270 = 0.97e-6."""
    assert draws_needed_for_rate(0.05, 1e-6) == 270
    assert min_detectable_rate(270, 1e-6) <= 0.05 < min_detectable_rate(269, 1e-6)


def test_a_rate_bound_follows_from_the_detection_probability() -> None:
    assert rate_upper_bound(0, 100, 1e-6) == pytest.approx(1 - 1e-6 ** (1 / 100))
    assert rate_upper_bound(5, 100, 1e-6) > rate_upper_bound(0, 100, 1e-6)
    assert rate_upper_bound(100, 100, 1e-6) == 1


def test_a_rate_bound_is_where_the_divergence_reaches_the_level() -> None:
    bound = rate_upper_bound(3, 60, 1e-3)
    assert 60 * _divergence(3 / 60, bound) == pytest.approx(math.log(1000))
    assert _divergence(0.25, 0.5) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert _divergence(0, 0.5) == _divergence(1, 0.5) == math.log(2)
    assert _divergence(0.5, 1) == _divergence(0.5, 0) == math.inf
    assert _divergence(1, 1) == 0


def test_sums_of_exponentials_neither_overflow_nor_vanish() -> None:
    rows = np.array([[1000.0, 1000.0, -np.inf], [-1000.0, -1001.0, -1000.0], [0.0, 1.0, 2.0]])
    expected = [1000 + math.log(2), -1000 + math.log(2 + math.exp(-1)), math.log(1 + math.e + math.e**2)]
    assert _log_sum_exp(rows) == pytest.approx(expected, abs=1e-12)


def test_the_grid_earns_its_share_of_the_best_stake() -> None:
    """At each shift the best of the grid earns stake * shift - stake**2 / 2 of shift**2 / 2."""
    shifts = np.geomspace(1 / 64, 1, 1000)[:, None]
    earned = (DIRECTION_STAKES * shifts - DIRECTION_STAKES**2 / 2).max(1)
    assert (earned >= GRID_SHARE * shifts[:, 0] ** 2 / 2 - 1e-12).all()
    assert (earned <= shifts[:, 0] ** 2 / 2 + 1e-12).all()


def test_the_stated_distance_is_found_as_often_as_stated() -> None:
    """A fair coin of distance min_detectable_tv at alpha = 1e-3, beta = 0.1: of 400 trials at most 74 may miss it,
    which happens with probability at most 1e-6 if a trial misses it with probability 0.1 at the most."""
    num_draws = draws_needed(0.1, 1e-3, 0.1)
    rng = np.random.default_rng(2)
    log_mean = np.log(np.cosh(DIRECTION_STAKES))
    misses = 0
    for _ in range(400):
        wealth = Wealth(len(DIRECTION_STAKES), 1e-3)
        signs = np.where(rng.random(num_draws) < 0.5 + 0.1, 1.0, -1.0)
        wealth.bet(signs[:, None] * DIRECTION_STAKES - log_mean)
        misses += wealth.found_after is None
    assert misses <= 74
    assert min_detectable_tv(num_draws, 1e-3, 0.1) <= 0.1


def test_intervals_hold_whenever_an_audit_stops() -> None:
    """2,000 audits that stop where the interval is worst: at a declared 5 % it misses the true mean at most 150 times,
    but with probability 1e-6, and less than half as often as the interval for a number of tokens fixed in advance."""
    num_audits, max_draws, alpha = 2000, 400, 0.05
    signs = np.random.default_rng(1).choice([-1.0, 1.0], size=(num_audits, max_draws))
    steps = np.arange(1, max_draws + 1)
    means = np.abs(signs.cumsum(1)) / steps
    uniform = np.array([radius_when_stopped(n, max_draws, alpha) for n in steps])
    fixed = np.array([radius(n, alpha) for n in steps])
    missed, missed_by_fixed = ((means > 2 * each).any(1).sum() for each in (uniform, fixed))
    assert missed <= 150
    assert missed_by_fixed > 2 * missed
    assert uniform[-1] < 1.2 * fixed[-1]


def test_an_interval_of_a_stopped_audit_is_that_of_the_next_horizon() -> None:
    """Of 100 tokens: 100, 50, 25, 13 are horizons, and 10 tokens are judged by the last of them."""
    shift = Shift(span=2.0, max_draws=100)
    shift.add(np.ones(10))
    found = shift.interval(0.05)
    assert found.estimate == 1
    assert found.high - 1 == pytest.approx(2 * radius(13, 0.05 / 14) * 13 / 10)
    assert [radius_when_stopped(n, 100, 0.05) for n in (100, 51)] == [radius(100, 0.025) * 100 / n for n in (100, 51)]


@pytest.mark.parametrize(
    ("num_draws", "max_draws", "horizon"), [(50, 100, 50), (13, 100, 13), (14, 100, 25), (1, 2, 1)]
)
def test_horizons_are_halves_rounded_up(num_draws: int, max_draws: int, horizon: int) -> None:
    """A number of tokens that is a horizon is judged by that one; a single token has a horizon of its own."""
    expected = radius(horizon, 0.05 / (2 * max_draws.bit_length())) * horizon / num_draws
    assert radius_when_stopped(num_draws, max_draws, 0.05) == expected
