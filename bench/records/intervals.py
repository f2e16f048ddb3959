"""Speed-ups and rates with an interval: times are only compared inside one run, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """An estimate and the ends of its 95 % interval, which are None if there is only one observation."""

    estimate: float
    low: float | None
    high: float | None


def geometric_mean_interval(ratios: Sequence[float]) -> BootstrapInterval:
    """Geometric mean of ratios and its percentile bootstrap interval over the observations.

    ratios: one for each round, > 0. The resampling is seeded, so equal ratios give equal intervals. With few
    observations (under ten or so) such an interval is somewhat too narrow.
    Raises ValueError if there is no ratio, or one that is not > 0.
    Source: Efron 1979; the logarithm makes a ratio and its inverse equally far from 1.
    """
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise ValueError(f"ratios={list(ratios)} must be finite, > 0 and at least one; check the clock")
    logs = np.log(ratios)
    if len(logs) == 1:
        return BootstrapInterval(float(ratios[0]), None, None)
    low, high = _ends(np.random.default_rng(0).choice(logs, (NUM_RESAMPLES, len(logs))).mean(1))
    return BootstrapInterval(math.exp(logs.mean()), math.exp(low), math.exp(high))


def unpaired_ratio_interval(above: Sequence[float], below: Sequence[float]) -> BootstrapInterval:
    """Ratio of two geometric means of unpaired values, each resampled independently, as above.

    above, below: > 0. Raises ValueError if one is empty or has a value that is not > 0.
    """
    for values in (above, below):
        if not values or not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"values={list(values)} must be finite, > 0 and at least one; check the clock")
    logs = [np.log(values) for values in (above, below)]
    estimate = math.exp(logs[0].mean() - logs[1].mean())
    if min(len(above), len(below)) == 1:
        return BootstrapInterval(estimate, None, None)
    random = np.random.default_rng(0)
    drawn = [random.choice(each, (NUM_RESAMPLES, len(each))).mean(1) for each in logs]
    low, high = _ends(drawn[0] - drawn[1])
    return BootstrapInterval(estimate, math.exp(low), math.exp(high))


def rate_interval(numerators: Sequence[int], denominators: Sequence[int]) -> BootstrapInterval | None:
    """Ratio of two sums over prompts, and its percentile bootstrap interval over the prompts, as above.

    Prompts with a denominator of 0 are resampled, too; resamples that consist of such prompts only are left out.
    Returns None if all denominators are 0. Raises ValueError if the numbers of both differ.
    """
    if len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} numerators must be as many as the denominators, {len(denominators)}")
    if not any(denominators):
        return None
    estimate = sum(numerators) / sum(denominators)
    if len(numerators) == 1:
        return BootstrapInterval(estimate, None, None)
    drawn = np.random.default_rng(0).integers(len(numerators), size=(NUM_RESAMPLES, len(numerators)))
    above, below = (np.asarray(counts)[drawn].sum(1) for counts in (numerators, denominators))
    return BootstrapInterval(estimate, *_ends(above[below > 0] / below[below > 0]))


def mean_difference_interval(values: Sequence[float], others: Sequence[float]) -> BootstrapInterval:
    """Mean of paired differences, one for each prompt, and its percentile bootstrap interval over prompts, as above.

    Raises ValueError if there are none, or if the numbers of both differ.
    """
    if not values or len(values) != len(others):
        raise ValueError(
            f"{len(values)} and {len(others)} values must be pairs, at least one; pass one value of each per prompt"
        )
    differences = np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64)
    if len(differences) == 1:
        return BootstrapInterval(float(differences[0]), None, None)
    drawn = np.random.default_rng(0).choice(differences, (NUM_RESAMPLES, len(differences))).mean(1)
    return BootstrapInterval(float(differences.mean()), *_ends(drawn))


def _ends(resampled: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the middle 95 % of the resampled values."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)
