"""Statistical gates that state both of their error rates.

A gate compares counts over the *full* support with a distribution by total variation. Its radius bounds the distance
that chance produces with probability alpha (Weissman et al. 2003, "Inequalities for the L1 deviation of the empirical
distribution"): P(TV(empirical, distribution) >= r) <= 2^V exp(-2 n r^2), for every n and every distribution. So

* a correct sampler fails with probability at most alpha, whatever the seed;
* a sampler at distance delta > 2 radius passes with probability at most alpha.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

ALPHA = 1e-6


def radius(num_draws: int, support_size: int, alpha: float = ALPHA) -> float:
    """Distance in total variation that n draws from the distribution itself exceed with probability at most alpha."""
    return math.sqrt((support_size * math.log(2) + math.log(1 / alpha)) / (2 * num_draws))


def distance(first: Mapping[Any, float], second: Mapping[Any, float]) -> float:
    """Total variation between two distributions given as {outcome: probability}."""
    return 0.5 * sum(abs(first.get(x, 0.0) - second.get(x, 0.0)) for x in first.keys() | second.keys())


def marginal(distribution: Mapping[tuple[int, ...], float], positions: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """The distribution of some positions of a tuple."""
    result: dict[tuple[int, ...], float] = defaultdict(float)
    for outcome, probability in distribution.items():
        result[tuple(outcome[i] for i in positions)] += probability
    return dict(result)


def passes(draws: Iterable[Hashable], distribution: Mapping[Any, float], support_size: int) -> bool:
    """Whether the draws may come from the distribution: empirical distance within the radius of the full support."""
    counts = Counter(draws)
    num_draws = counts.total()
    empirical = {outcome: count / num_draws for outcome, count in counts.items()}
    return distance(empirical, distribution) < radius(num_draws, support_size)
