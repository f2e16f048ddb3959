"""Drift of acceptance: over the steps of a text, and over the time that a server has been running.

Both tests are exact for any distribution of acceptance. Their p-value is at most alpha with a probability of at most
alpha if there is no drift, whatever the number of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

NUM_DRAWS = 9999  # random rearrangements, of which the data are one more
MAX_ENUMERATED = 12  # prompts whose sign flips are all enumerated
FALSE_ALARM_RATE = 0.01  # at which reports speak of a drift

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Drift:
    """Slope of the acceptance length in tokens per unit of time, and the p-value (two-sided) of there being none."""

    slope: float
    p_value: float


def drift_within(texts: Sequence[Sequence[int]], clusters: Sequence[int] | None = None) -> Drift | None:
    """Drift over the steps of texts: the common slope of tokens per step within each text, in tokens per step.

    texts: tokens emitted by each step of each text, in order. Without drift a text's steps in reverse are as likely, so
    the sign of its own slope is arbitrary: the p-value is that of the sum of slopes among all choices of signs.
    clusters: of each text; those of one cluster, such as the turns of a conversation, change their signs together.
    None if no text has a slope. With n texts the smallest possible p-value is 2 / 2**n: 0.008 with eight.
    Source: Fisher 1935, the test of randomness by sign flips.
    """
    centered = [(np.arange(len(text)) - (len(text) - 1) / 2, np.asarray(text, dtype=np.float64)) for text in texts]
    products = np.array([float(place @ lengths) for place, lengths in centered])
    if not products.any():
        return None
    squares = sum(float(place @ place) for place, _ in centered)
    if clusters is not None:
        products = np.array([products[np.asarray(clusters) == each].sum() for each in dict.fromkeys(clusters)])
    total = float(products.sum())
    is_random = len(products) > MAX_ENUMERATED
    return Drift(total / squares, _share(_signs(len(products)) @ products, total, is_random=is_random))


def drift_over_time(times_s: Sequence[float], emitted: Sequence[int], steps: Sequence[int]) -> Drift | None:
    """Drift over requests: slope of the acceptance length over their arrival, in tokens per second.

    emitted, steps: of each request's decode steps. Without drift any assignment of requests to arrivals is as likely:
    the p-value is that of the slope among random assignments. None with fewer than three requests, with one acceptance
    length for all, or if all arrive at once.
    Source: Pitman 1937, the permutation test of a correlation.
    """
    times, weights = np.asarray(times_s, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if len(times) < 3 or not weights.any():
        return None
    excess = np.asarray(emitted, dtype=np.float64) - sum(emitted) / sum(steps) * weights
    centered = times - times @ weights / weights.sum()
    spread = float(centered**2 @ weights)
    if np.allclose(excess, 0) or not spread:
        return None
    random = np.random.default_rng(0)
    drawn = np.array([times @ random.permutation(excess) for _ in range(NUM_DRAWS)])
    found = float(times @ excess)
    return Drift(found / spread, _share(drawn, found, is_random=True))


@cache
def _signs(number: int) -> Array:
    """All choices of signs of a few values, or random ones of many: rows of -1 and 1."""
    if number <= MAX_ENUMERATED:
        bits = np.arange(1 << number)[:, None] >> np.arange(number) & 1
        return (2 * bits - 1).astype(np.float64)
    return np.random.default_rng(0).choice(np.array([-1.0, 1.0]), (NUM_DRAWS, number))


def _share(drawn: Array, found: float, *, is_random: bool) -> float:
    """The share of values at least as far from 0 as the one that was found; random draws do not include that one."""
    num_far = int((np.abs(drawn) >= abs(found) * (1 - 1e-9)).sum())
    return (num_far + is_random) / (len(drawn) + is_random)
