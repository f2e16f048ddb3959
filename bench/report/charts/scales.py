"""Axes: from values to coordinates, and round numbers to label them with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Tick = tuple[float, str]
LETTER = 6.3  # mean width of a letter at font size 11, in user units
NUM_TICKS = 5
MAX_STRETCH = 3.0  # an axis reaches at most this many times the largest value, however long an interval is


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from [low, high] to coordinates from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)


def axis_end(values: Sequence[float], highs: Sequence[float]) -> float:
    """The largest value that an axis must reach: one very long interval must not squeeze everything else."""
    largest = max(values, default=1.0)
    return max([largest, *(min(high, MAX_STRETCH * largest) for high in highs)])


def ticks(high: float, low: float = 0.0) -> list[Tick]:
    """Round numbers from at most `low` to at least `high`."""
    if high <= low:
        return [(low, f"{low:,.6g}"), (low + 1, f"{low + 1:,.6g}")]
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 0.001), math.ceil(high / step - 0.001)
    return [(step * index, f"{step * index:,.6g}") for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[Tick]:
    """1, 2 and 5 times powers of ten, from at most `low` to at least `high`; both > 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    places = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first = max((place for place in places if place <= low * 1.001), default=places[0])
    last = min((place for place in places if place >= high * 0.999), default=places[-1])
    return [(place, f"{place:,g}") for place in places if first <= place <= last]


def thinned(labeled: Sequence[Tick], scale: Scale) -> list[Tick]:
    """The ticks whose labels do not overlap; the last one always stays."""
    kept: list[Tick] = []
    for place, label in reversed(labeled):
        room = (len(label) + len(kept[-1][1])) / 2 * LETTER + 8 if kept else 0
        if not kept or scale(kept[-1][0]) - scale(place) >= room:
            kept.append((place, label))
    return kept[::-1]
