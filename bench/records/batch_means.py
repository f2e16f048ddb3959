"""Statistics of a load in its steady state, by the method of batch means.

Requests wait for each other, so neighbors in time resemble each other and are no independent observations. Consecutive
parts of the time, or groups of requests, depend on each other far less: their means are taken as the observations, and
intervals follow by Student's t. This holds if parts are long compared with the time that a queue takes to empty, so it
fails near saturation; `tests/bench/measure/test_sweep.py` measures how often.

Source: Conway 1963, Some Tactical Problems in Digital Simulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from bench.records.intervals import CONFIDENCE, Interval
from bench.records.student import t_quantile

NUM_PARTS = 10
MIN_PARTS = 4  # fewer say nothing about growth
GROWTH_CONFIDENCE = 0.99
MAX_GROWTH = 0.02  # seconds of latency per second: a server that falls behind by less is not called saturated


@dataclass(frozen=True, slots=True)
class Growth:
    """Growth of latency per second of arrivals, and its lower bound (one-sided, 99 %)."""

    slope: float
    low: float

    @property
    def is_saturated(self) -> bool:
        """Whether latency grows without bound: whether the lower bound exceeds MAX_GROWTH."""
        return self.low > MAX_GROWTH


def batch_means_interval(estimate: float, parts: Sequence[float]) -> Interval:
    """The 95 % interval around an estimate, from the spread of the same quantity (>= 0) in consecutive parts.

    With fewer than two parts there are no ends.
    """
    if len(parts) < 2:
        return Interval(estimate, None, None)
    radius = _radius(parts)
    return Interval(estimate, max(0.0, estimate - radius), estimate + radius)


def batch_ratio_interval(estimate: float, ratios: Sequence[float]) -> Interval:
    """The same on the logarithmic scale, for a ratio > 0."""
    if len(ratios) < 2:
        return Interval(estimate, None, None)
    radius = _radius(np.log(ratios).tolist())
    return Interval(estimate, estimate * math.exp(-radius), estimate * math.exp(radius))


def latency_growth(arrivals_s: Sequence[float], latencies_s: Sequence[float]) -> Growth | None:
    """Slope of latency over arrival, by least squares through the means of consecutive groups of requests.

    arrivals_s: in order. A queue that is served in order and receives r times what the server can do grows by r - 1
    seconds per second; one that keeps up does not grow. None with fewer than MIN_PARTS requests.
    """
    if len(arrivals_s) < MIN_PARTS:
        return None
    times, latencies = (np.array([np.mean(each) for each in groups(values)]) for values in (arrivals_s, latencies_s))
    centered = times - times.mean()
    if not (spread := float(centered @ centered)):
        return None
    slope = float(centered @ latencies) / spread
    residuals = latencies - latencies.mean() - slope * centered
    degrees = len(times) - 2
    error = math.sqrt(float(residuals @ residuals) / degrees / spread)
    return Growth(slope, slope - t_quantile(GROWTH_CONFIDENCE, degrees) * error)


def groups(values: Sequence[float]) -> list[Sequence[float]]:
    """Consecutive groups of values, NUM_PARTS of them or one for each value, of sizes that differ by at most one."""
    number = min(NUM_PARTS, len(values))
    ends = [len(values) * part // number for part in range(number + 1)] if number else []
    return [values[start:end] for start, end in pairwise(ends)]


def _radius(values: Sequence[float]) -> float:
    if min(values) == max(values):
        return 0.0
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * error
