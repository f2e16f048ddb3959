"""How cells change over many runs, as of a nightly job: series of values, and the runs at which their level changes.

A change-point splits a series where the levels before and after differ most: the largest standardized sum of
deviations (CUSUM). Its p-value is that of this maximum among random orders of the same values, so it is exact whatever
the noise looks like, as long as runs without a change are exchangeable. A library of change-points such as ruptures
takes a penalty instead, which has no false-alarm rate. Both parts of a split are searched again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from bench.analysis.run_diff import CONDITIONS, PROMPTS, circumstances
from bench.records.results import Results, cell_id
from bench.records.schema import Record

METRICS = ("speedup", "speedup_of_reference", "mean_acceptance_length")  # measured side by side, or counts
OF_PLAIN = ("speedup_of_reference",)  # the metrics of plain decoding; the others are of cells that draft
FALSE_ALARM_RATE = 0.01  # the probability that a page of series without a change marks one
MIN_DRAWS = 9999  # random orders of a series
BATCH = 1000  # of random orders at a time
DRAWS_PER_LEVEL = 20  # a p-value at the level is then known to a fifth of itself

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Point:
    """A value in a run, and the ends of its interval, if it has one."""

    run: Results
    record: Record
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of level. at: index of the first point of the new level. before, after: the levels, as means.

    circumstances: what else changed at that run, as sentences.
    """

    at: int
    before: float
    after: float
    p_value: float
    circumstances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """A metric of a cell over the runs that have it, under the same options and prompts."""

    metric: str
    points: tuple[Point, ...]
    changes: tuple[Change, ...] = ()

    @property
    def record(self) -> Record:
        """The latest."""
        return self.points[-1].record


def histories(runs: Sequence[Results], false_alarm_rate: float = FALSE_ALARM_RATE) -> list[Series]:
    """The series of all cells in runs, by date, with their change-points; in the order of the latest run.

    false_alarm_rate: that any of the series is marked if none changed. Each has an equal share of it (Bonferroni).
    """
    groups: dict[tuple[str, ...], list[Point]] = {}
    for run in sorted(runs, key=lambda run: run.date, reverse=True):
        for record in run.cells:
            for metric, point in _points(run, record):
                groups.setdefault((metric, cell_id(record), *_conditions(record)), []).insert(0, point)
    ordered = sorted(groups.items(), key=lambda item: METRICS.index(item[0][0]))
    level = false_alarm_rate / max(1, len(ordered))
    return [_series(key[0], points, level) for key, points in ordered]


def _points(run: Results, record: Record) -> Iterator[tuple[str, Point]]:
    """The metrics of a cell."""
    for metric in METRICS:
        value = record.get(metric)
        if value is not None and value > 0 and (record["method"] == "autoregressive") == (metric in OF_PLAIN):
            yield metric, Point(run, record, value, record.get(f"{metric}_low"), record.get(f"{metric}_high"))


def _conditions(record: Record) -> Iterator[str]:
    """What makes values of a cell incomparable: they are another series."""
    return (str(record.get(name)) for name in (*CONDITIONS, *PROMPTS))


def _series(metric: str, points: Sequence[Point], level: float) -> Series:
    logs = np.log([point.value for point in points])
    return Series(metric, tuple(points), tuple(_changes(points, change_points(logs, level))))


def _changes(points: Sequence[Point], found: Sequence[tuple[int, float]]) -> Iterator[Change]:
    """Changes of level, each with the levels of the neighboring segments."""
    ends = [0, *(at for at, _ in found), len(points)]
    logs = np.log([point.value for point in points])
    levels = [math.exp(float(logs[start:end].mean())) for start, end in pairwise(ends)]
    for index, (at, p_value) in enumerate(found):
        old, new = points[at - 1], points[at]
        reasons = tuple(circumstances(old.run, new.run, old.record, new.record))
        yield Change(at, levels[index], levels[index + 1], p_value, reasons)


def change_points(values: Sequence[float] | Array, level: float, seed: int = 0) -> list[tuple[int, float]]:
    """(index of the first value of a new level, p-value) of each change-point, in order.

    level: the probability of finding any in exchangeable values. seed: of the random orders.
    """
    return _split(np.asarray(values, dtype=np.float64), 0, level, np.random.default_rng(seed))


def _split(values: Array, start: int, level: float, random: np.random.Generator) -> list[tuple[int, float]]:
    """The change-points of a segment that begins at index `start`."""
    if len(values) < 3 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return []
    scores = _scores(values)
    p_value = _p_value(values, float(scores.max()), level, random)
    if p_value is None:
        return []
    at = int(scores.argmax()) + 1
    before = _split(values[:at], start, level, random)
    return [*before, (start + at, p_value), *_split(values[at:], start + at, level, random)]


def _p_value(values: Array, found: float, level: float, random: np.random.Generator) -> float | None:
    """The share of orders with a score of at least `found`; None as soon as it is sure to be above the level."""
    num_draws, num_far = max(MIN_DRAWS, math.ceil(DRAWS_PER_LEVEL / level)), 0
    for first in range(0, num_draws, BATCH):
        batch = np.broadcast_to(values, (min(BATCH, num_draws - first), len(values)))
        num_far += int((_scores(random.permuted(batch, axis=1)).max(-1) >= found * (1 - 1e-9)).sum())
        if 1 + num_far > level * (1 + num_draws):
            return None
    return (1 + num_far) / (1 + num_draws)


def _scores(values: Array) -> Array:
    """How far the sums before each split are from those of a constant level, standardized. values: [..., n]."""
    number = values.shape[-1]
    sums = np.cumsum(values - values.mean(-1, keepdims=True), -1)[..., :-1]
    sizes = np.arange(1, number)
    scores: Array = np.abs(sums) / np.sqrt(sizes * (number - sizes))
    return scores
