"""Speed-ups and rates with 95 % intervals: times are only compared inside one run, prompt by prompt.

Runs are short, often eight prompts. A percentile bootstrap of so few observations covers the true value in 84 to 89 %
of runs instead of 95 %; intervals by Student's t distribution keep their promise (tests/bench/records/test_intervals.py
measures both). Prompts are the observations: the tokens of one prompt are not independent. Neither are the turns of a
conversation: where `clusters` are given, they are the observations, and the standard error is that of their sums. With
as many clusters as prompts it is the usual one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.records.student import t_quantile

CONFIDENCE = 0.95
MAX_LOG = 300.0  # reach of an interval on the logarithmic scale; a damaged file must not overflow


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its 95 % interval, which are None if there is only one observation."""

    estimate: float
    low: float | None
    high: float | None


def geometric_mean_interval(ratios: Sequence[float], clusters: Sequence[int] | None = None) -> Interval:
    """Geometric mean of ratios and its interval: Student's t on their logarithms.

    ratios: one for each round, > 0. On the logarithmic scale a ratio and its inverse are equally far from 1. clusters:
    the number of the cluster of each; None if all are independent.
    Raises ValueError if there is no ratio, or one that is not > 0.
    Source: Student 1908; for clusters Liang and Zeger 1986.
    """
    logs = _logs(ratios, "ratios")
    error, number = _error(logs, clusters)
    mean = math.exp(logs.mean())
    if number == 1:
        return Interval(float(ratios[0]) if len(ratios) == 1 else mean, None, None)
    return _exponential(mean, _t_radius(error, number - 1))


def geometric_mean_bound(ratios: Sequence[float], level: float, clusters: Sequence[int] | None = None) -> float:
    """Upper end of a one-sided interval of the geometric mean; the true value exceeds it with probability `level`.

    ratios, clusters: as for `geometric_mean_interval`, of at least two clusters. level: in (0, 0.5). Raises ValueError
    otherwise.
    """
    logs = _logs(ratios, "ratios")
    error, number = _error(logs, clusters)
    if number < 2:
        raise ValueError(f"{number} cluster must be at least 2: one has no interval")
    radius = error * t_quantile(1 - level, number - 1) if error else 0.0
    return math.exp(min(logs.mean() + radius, MAX_LOG))


def unpaired_ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Ratio of two geometric means of unpaired values: Welch's t on their logarithms, degrees of freedom rounded down.

    above, below: > 0. Raises ValueError if one is empty or has a value that is not > 0.
    Source: Welch 1947.
    """
    logs = [_logs(values, "values") for values in (above, below)]
    estimate = math.exp(logs[0].mean() - logs[1].mean())
    if min(len(above), len(below)) == 1:
        return Interval(estimate, None, None)
    squares = [_standard_error(each) ** 2 for each in logs]
    if not sum(squares):
        return Interval(estimate, estimate, estimate)
    terms = (square**2 / (len(each) - 1) for square, each in zip(squares, logs, strict=True))
    degrees = math.floor(sum(squares) ** 2 / sum(terms) + 1e-9)
    return _exponential(estimate, _t_radius(math.sqrt(sum(squares)), degrees))


def rate_interval(
    numerators: Sequence[int], denominators: Sequence[int], clusters: Sequence[int] | None = None
) -> Interval | None:
    """A rate, the ratio of two sums over prompts, and its interval: the jackknife over prompts on the logit scale.

    Deleting one prompt at a time allows for tokens of a prompt that resemble each other, whatever their number. Prompts
    with a denominator of 0 say nothing about the rate and are left out. The interval of a rate of 0 or 1 has no width.
    clusters: the number of the cluster of each prompt, which are then deleted one at a time; None for single prompts.
    Returns None if all denominators are 0. Raises ValueError if the numbers of both differ, or a rate exceeds 1.
    Source: Tukey 1958, with Student's t for few prompts.
    """
    return _jackknife(numerators, denominators, clusters, _on_logit_scale)


def length_interval(
    emitted: Sequence[int], steps: Sequence[int], clusters: Sequence[int] | None = None
) -> Interval | None:
    """As `rate_interval`, for tokens per step: on the logarithmic scale, and at least 1, as no step emits none."""
    return _jackknife(emitted, steps, clusters, _of_length)


def mean_difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean of paired differences, one for each prompt, and its interval by Student's t.

    Raises ValueError if there are none, or if the numbers of both differ.
    """
    if not values or len(values) != len(others):
        raise ValueError(
            f"{len(values)} and {len(others)} values must be pairs, at least one; pass one value of each per prompt"
        )
    differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    mean = float(differences.mean())
    if len(differences) == 1:
        return Interval(mean, None, None)
    radius = _t_radius(_standard_error(differences), len(differences) - 1)
    return Interval(mean, mean - radius, mean + radius)


def _logs(values: Sequence[float], name: str) -> npt.NDArray[np.float64]:
    if not values or not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"{name}={list(values)} must be finite, > 0 and at least one; check the clock")
    return np.log(values)


def _error(logs: npt.NDArray[np.float64], clusters: Sequence[int] | None) -> tuple[float, int]:
    """The standard error of a mean of clusters, exactly 0 for equal values, and the number of clusters."""
    sums, number = _sums(logs - logs.mean(), clusters)
    if number == 1 or logs.min() == logs.max():
        return 0.0, number
    return math.sqrt(float(sums @ sums) * number / (number - 1)) / len(logs), number


def _standard_error(values: npt.NDArray[np.float64]) -> float:
    """Of the mean; exactly 0 for equal values, whatever the rounding of their mean."""
    if values.min() == values.max():
        return 0.0
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _t_radius(standard_error: float, degrees: int) -> float:
    return standard_error * t_quantile((1 + CONFIDENCE) / 2, degrees) if standard_error else 0.0


def _sums(values: npt.NDArray[np.float64], clusters: Sequence[int] | None) -> tuple[npt.NDArray[np.float64], int]:
    """The sums of values, or of rows of them, over each cluster, and the number of clusters."""
    if clusters is None:
        return values, len(values)
    if len(clusters) != len(values):
        raise ValueError(f"{len(clusters)} clusters must be one for each of the {len(values)} values")
    _, places = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.zeros((int(places.max()) + 1, *values.shape[1:]))
    np.add.at(sums, places, values)
    return sums, len(sums)


def _jackknife(
    numerators: Sequence[int],
    denominators: Sequence[int],
    clusters: Sequence[int] | None,
    transform: Callable[[float, float], Interval],
) -> Interval | None:
    """The ratio of the sums. transform: (ratio, its radius) -> interval, on a scale where errors are more symmetric."""
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators must be as many as the denominators, {len(denominators)}")
    if not any(denominators):
        return None
    counts, _ = _sums(np.array([*zip(numerators, denominators, strict=True)], dtype=np.float64), clusters)
    counts = counts[counts[:, 1] > 0]
    totals = counts.sum(0)
    estimate = float(totals[0] / totals[1])
    if len(counts) == 1:
        return Interval(estimate, None, None)
    rest = totals - counts
    without = rest[:, 0] / rest[:, 1]
    number = len(counts)
    return transform(estimate, _t_radius(_standard_error(without) * (number - 1), number - 1))


def _on_logit_scale(rate: float, radius: float) -> Interval:
    if rate > 1:
        raise ValueError(f"rate={rate:g} must be at most 1: the numerators count a part of the denominators")
    if rate in (0, 1) or not radius:
        return Interval(rate, rate, rate)
    logit, reach = math.log(rate / (1 - rate)), radius / (rate * (1 - rate))
    return Interval(rate, *(_logistic(logit + sign * reach) for sign in (-1, 1)))


def _logistic(value: float) -> float:
    """Without overflow, as one of the exponents is negative."""
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def _of_length(length: float, radius: float) -> Interval:
    if length < 1:
        raise ValueError(f"length={length:g} must be at least 1: every step emits a token")
    found = _exponential(length, radius / length)
    return Interval(length, max(found.low or 1.0, 1.0), found.high)


def _exponential(ratio: float, radius: float) -> Interval:
    """radius: of the logarithm."""
    radius = min(radius, MAX_LOG)
    return Interval(ratio, ratio * math.exp(-radius), ratio * math.exp(radius))
