"""Quantiles of Student's t distribution, without SciPy: reading results needs the standard library and NumPy only."""

from __future__ import annotations

import math
from functools import cache


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The value that a t-distributed variable exceeds with 1 - probability.

    probability: in (0.5, 1). degrees: of freedom, at least 1. Raises ValueError otherwise.
    """
    if not 0.5 < probability < 1 or degrees < 1:
        raise ValueError(f"probability={probability} must lie in (0.5, 1), and degrees={degrees} must be at least 1")
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(degrees), in which the probability is smooth
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _within(middle, degrees) < 2 * probability - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Probability that |t| <= sqrt(degrees) * tan(angle), as a finite sum.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = degrees % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for step in range(degrees // 2):
        total += term
        index = 2 * step + 1 + is_odd
        term *= cosine**2 * index / (index + 1)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
