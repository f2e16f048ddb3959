"""Sequential tests by betting, and their power. All bounds hold for finite samples; nothing is asymptotic.

Before each token, a bet assigns a factor to every possible token such that the mean factor under the null distribution
is 1. The running product of factors, the wealth, is then a martingale, and by Ville's inequality it ever reaches
1/alpha with probability at most alpha. So the test can be checked after every token, and 1 over the largest wealth so
far is a p-value.

Sources: Ville 1939; Shafer 2021, "Testing by betting"; Waudby-Smith and Ramdas 2024, "Estimating means of bounded
random variables by betting" (arXiv:2010.09686); Hoeffding 1963 and Azuma 1967 for the intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_SMALLEST_P = 1e-300
# On a grid with ratio 2, the best stake of the grid earns at least this share of what the optimal stake earns: at x
# times the optimum the share is x (2 - x), and some x of the grid lies in [1/sqrt(2), sqrt(2)].
GRID_SHARE = 2 * math.sqrt(2) - 2


def both_signs(*stakes: float) -> Array:
    """A symmetric grid of stakes."""
    return np.array([sign * stake for sign in (1, -1) for stake in stakes])


DIRECTION_STAKES = both_signs(1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)


class Wealth:
    """Wealth divided evenly among several bets, each multiplying its own share.

    num_bets: number of bets. level: the p-value at which `found_after` is set.
    """

    def __init__(self, num_bets: int, level: float) -> None:
        self._log_shares: Array = np.full(num_bets, -math.log(num_bets))
        self._log_level, self._log_peak, self.num_steps = math.log(1 / level), 0.0, 0
        self.found_after: int | None = None

    @property
    def p_value(self) -> float:
        """The current p-value, valid at any time; at least 1e-300."""
        return max(math.exp(-self._log_peak) if self._log_peak < 690 else 0.0, _SMALLEST_P)

    def bet(self, log_factors: Array) -> None:
        """Bet on n tokens in sequence. log_factors: float64 [n, num_bets]."""
        if not len(log_factors):
            return
        paths = self._log_shares + log_factors.cumsum(0)
        totals = _log_sum_exp(paths)
        if self.found_after is None and (totals >= self._log_level).any():
            self.found_after = self.num_steps + int((totals >= self._log_level).argmax()) + 1
        self._log_shares, self._log_peak = paths[-1], max(self._log_peak, float(totals.max()))
        self.num_steps += len(log_factors)


class Exchangeability:
    """Tests whether two arms answering the same prompts have the same distribution. No reference is needed.

    If they do, the arms are exchangeable: the difference of any statistic between the two answers to a prompt is
    symmetric about 0, so exp(stake * difference) / cosh(stake * difference) has mean 1, whatever the variance.
    Source: de la Pena 1999, "A general class of exponential inequalities for martingales and ratios".
    """

    STAKES = both_signs(*(2.0**-k for k in range(8)))

    def __init__(self, num_statistics: int, level: float) -> None:
        self.wealth = Wealth(num_statistics * len(self.STAKES), level)

    def observe(self, first: Array, second: Array) -> None:
        """first, second: statistics of both arms' answers to the same prompts, float64 [prompts, statistics]."""
        exponents = ((first - second)[..., None] * self.STAKES).reshape(len(first), -1)
        size = np.abs(exponents)
        self.wealth.bet(exponents - size - np.log1p(np.exp(-2 * size)) + math.log(2))


@dataclass(frozen=True, slots=True)
class ConfidenceInterval:
    """An estimate with bounds. All intervals of an audit hold together with probability at least 1 - alpha."""

    estimate: float
    low: float
    high: float


class Shift:
    """The mean deviation of a statistic from its exact mean, over the tokens of an arm.

    span: largest minus smallest value of the statistic. max_draws: the most tokens that are added, fixed in advance.
    """

    def __init__(self, span: float, max_draws: int) -> None:
        self.span, self.max_draws, self._sum, self.num_draws = span, max_draws, 0.0, 0

    def add(self, values: Array) -> None:
        self._sum += float(values.sum())
        self.num_draws += len(values)

    def interval(self, alpha: float) -> ConfidenceInterval:
        """Azuma's interval for the mean of the conditional means; it holds whenever the audit stops."""
        estimate = self._sum / self.num_draws
        width = self.span * radius_when_stopped(self.num_draws, self.max_draws, alpha)
        return ConfidenceInterval(estimate, estimate - width, estimate + width)


def radius(num_draws: int, alpha: float) -> float:
    """Hoeffding radius: the mean of n numbers in [0, 1] deviates by more with probability at most alpha."""
    return math.sqrt(math.log(2 / alpha) / (2 * num_draws))


def radius_when_stopped(num_draws: int, max_draws: int, alpha: float) -> float:
    """As `radius`, if n of up to max_draws numbers were taken, and when to stop was decided by what they were.

    Hoeffding's bound on the sum of m numbers holds for all of its first m partial sums together (Azuma's inequality for
    the maximum). Half of alpha goes to m = max_draws, the other half to its halves, quarters and so on.
    """
    horizon, share = max_draws, alpha / 2
    while -(-horizon // 2) >= num_draws and horizon > 1:
        horizon, share = -(-horizon // 2), alpha / (2 * max_draws.bit_length())
    return radius(horizon, share) * horizon / num_draws


def min_detectable_tv(num_draws: int, alpha: float, beta: float) -> float:
    """The smallest distance along a direction that n tokens detect, with error rates alpha and beta.

    The mean of f = 1, 0 or -1 is then shifted by twice the distance. The best stake of the grid gains a log-wealth of
    at least n * GRID_SHARE * shift**2 / 2, by Hoeffding's lemma. That suffices to reach 1/alpha with all stakes of the
    grid if the observed shift/2 is sqrt(ln(stakes/alpha) / (2 n GRID_SHARE)), and except with probability beta the
    observed value is below the true one by at most sqrt(ln(1/beta) / (2 n)).
    """
    return _reach(alpha, beta) / math.sqrt(num_draws)


def draws_needed(tv: float, alpha: float, beta: float) -> int:
    """The number of tokens for which `min_detectable_tv` is at most tv."""
    return math.ceil((_reach(alpha, beta) / tv) ** 2)


def _reach(alpha: float, beta: float) -> float:
    found = math.sqrt(math.log(len(DIRECTION_STAKES) / alpha) / (2 * GRID_SHARE))
    return found + math.sqrt(math.log(1 / beta) / 2)


def min_detectable_rate(num_draws: int, beta: float) -> float:
    """The smallest rate of a forbidden event that n tokens miss with probability at most beta."""
    return float(-np.expm1(math.log(beta) / num_draws))


def draws_needed_for_rate(rate: float, beta: float) -> int:
    """The number of tokens for which `min_detectable_rate` is at most rate."""
    return math.ceil(math.log(beta) / math.log1p(-rate))


def rate_upper_bound(num_events: int, num_draws: int, alpha: float) -> float:
    """Upper confidence bound at level 1 - alpha on the rate of an event, by the Chernoff bound."""
    observed = num_events / num_draws
    low, high = observed, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if num_draws * _divergence(observed, middle) < math.log(1 / alpha):
            low = middle
        else:
            high = middle
    return high


def _divergence(one: float, other: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli distributions, in nats."""
    parts = ((one, other), (1 - one, 1 - other))
    return sum(p * math.log(p / q) if q else math.inf for p, q in parts if p)


def _log_sum_exp(values: Any) -> Array:
    peak = values.max(1)
    result: Array = peak + np.log(np.exp(values - peak[:, None]).sum(1))
    return result
