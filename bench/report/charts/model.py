"""Charts as plain data: made in `charts.decoding` and `charts.cost`, drawn by `charts.drawing` and `html.svg`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind. low, high: ends of their intervals, or None. dashed: computed or for comparison.

    kind: series of the same kind have the same colour. line: whether the points are joined, but for the last
    num_loose. names: of each point, where its place on the x axis does not say what it is.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: int = 0
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    dashed: bool = False
    line: bool = True
    num_loose: int = 0
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over numbers. name: of its file. title: what is shown, and in a second line of which models and prompts.

    log_x, log_y: powers of two, or of ten where x has none. ticks: labels of places on the x axis, where the numbers
    themselves do not say it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None
    y_most: float = 0.0


@dataclass(frozen=True, slots=True)
class Bars:
    """Stacked bars, each of parts that add up to 1. bars: (label, note at its end, parts)."""

    name: str
    title: str
    x_label: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, str, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of `Rows`: a value with the ends of its interval (the value itself, if it has none), and a prediction."""

    label: str
    value: float
    low: float
    high: float
    kind: int = 0
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Values with intervals, one below the other. reference: the value that they are compared with."""

    name: str
    title: str
    x_label: str
    lines: tuple[Line, ...]
    reference: float = 1.0


Picture = Chart | Bars | Rows
