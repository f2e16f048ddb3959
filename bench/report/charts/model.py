"""Charts as plain data: built by the other modules of this package, drawn by `charts.svg`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one color and marker, selected by `kind`; -1 is the neutral one of plain decoding.

    low, high: ends of the points' intervals; left, right: those of their x values. dashed: predicted, or a line to
    compare with. line: whether the points are joined; the last `num_detached` never are. names: what each point is,
    where its x value does not say it.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: int = 0
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    dashed: bool = False
    line: bool = True
    num_detached: int = 0
    names: tuple[str, ...] | None = None
    left: tuple[float, ...] | None = None
    right: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Series over a numeric x axis.

    name: part of the file name. title: what is shown and, on a second line, for which models and prompts. ticks: places
    and labels of the x axis, where numbers alone would not do. y_max: least value the y axis reaches. is_zoomed: the y
    axis spans the values instead of beginning at 0. marks: places on the x axis where something changes, and what.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None
    y_max: float = 0.0
    is_zoomed: bool = False
    marks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Bars:
    """Stacked bars whose shares add up to 1. bars: (label, note at the right, one share per part)."""

    name: str
    title: str
    x_label: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, str, tuple[float, ...]], ...]


@dataclass(frozen=True, slots=True)
class Line:
    """One row of `Rows`: a value, the ends of its interval (the value itself if it has none) and a prediction."""

    label: str
    value: float
    low: float
    high: float
    kind: int = 0
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """A forest plot: values with intervals, one per row, against a reference value.

    x_min, x_max: what the axis includes. digits: decimals of the values. keys: (kind, meaning) of colors that labels do
    not explain.
    """

    name: str
    title: str
    x_label: str
    lines: tuple[Line, ...]
    reference: float = 1.0
    reference_label: str = "plain decoding"
    x_min: float = 0.0
    x_max: float = 0.0
    digits: int = 2
    keys: tuple[tuple[int, str], ...] = ()


Picture = Chart | Bars | Rows
