"""Charts as SVG elements: the HTML page embeds them, and `charts.files` writes them to files.

Own code because the result must be small, accessible, and readable in light and dark: matplotlib's SVG of the same
charts is five times as large, with fixed colors and nothing for a screen reader. `xml.etree` builds the elements and
escapes their text; chart.css has the colors. Every chart has a title and a description, every point a tooltip.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from bench.report.charts.model import Bars, Chart, Line, Picture, Rows, Series
from bench.report.charts.scales import LETTER, Scale, Tick, axis_end, log_ticks, thinned, ticks
from bench.report.charts.words import describe, heading, interval, points

STYLE = Path(__file__).with_name("chart.css")
WIDTH = 440.0  # user units: text of size 11 stays legible where the page is as narrow as a phone
HEIGHT = 280.0
TOP, BOTTOM, RIGHT = 26.0, 40.0, 16.0
ROW = 38.0
MAX_LABEL = 44  # letters that fit beside a value with its interval
KEY = 18.0  # height of a line of the legend
KEY_LETTER = LETTER * 12 / 11
NUM_KINDS = 8
MARKED = 1  # the kind in whose color changes are marked
MARKERS = (  # one per kind, so that color is never the only difference
    "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
    "m-3.6 -3.6h7.2v7.2h-7.2z",
    "m0 -5l5 5l-5 5l-5 -5z",
    "m0 -5l4.8 8.6h-9.6z",
    "m0 5l4.8 -8.6h-9.6z",
    "m-1.6 -4.8h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z",
    "m-4.8 -2.4l2.4 -2.4l2.4 2.4l2.4 -2.4l2.4 2.4l-2.4 2.4l2.4 2.4l-2.4 2.4l-2.4 -2.4l-2.4 2.4l-2.4 -2.4l2.4 -2.4z",
    "m-6 0l4 -2l2 -4l2 4l4 2l-4 2l-2 4l-2 -4z",
)
NOT_XML = dict.fromkeys([*range(9), 11, 12, *range(14, 32)])  # control characters, which XML does not allow


def draw(picture: Picture) -> str:
    """The chart with its legend, as an `<svg>` element to embed in a page."""
    drawn, height = chart(picture)
    return ET.tostring(image(picture, *drawn, box=(0.0, 0.0, WIDTH, height)), encoding="unicode")


def image(picture: Picture, *children: ET.Element, box: Sequence[float]) -> ET.Element:
    """The root element: a screen reader announces its title and description. box: x, y, width and height."""
    title = element("title", text=heading(picture)[0])
    view = " ".join(f"{each:g}" for each in box)
    return element(
        "svg", title, element("desc", text=describe(picture)), *children, class_="chart", role="img", viewBox=view
    )


def chart(picture: Picture) -> tuple[list[ET.Element], float]:
    """The elements of a chart and its legend, and their height."""
    match picture:
        case Chart():
            drawn, height, keys = _lines(picture), HEIGHT, _line_keys(picture)
        case Bars():
            drawn, height = _bars(picture), ROW * len(picture.bars)
            keys = [(_swatch(kind), part) for kind, part in enumerate(picture.parts)]
        case Rows():
            drawn, height, keys = _rows(picture), 42 + ROW * len(picture.lines), _row_keys(picture)
    legend, legend_height = _legend(keys, height + 8)
    return [*drawn, *legend], height + 8 + legend_height


# ---- elements


def element(tag: str, *children: ET.Element, text: str = "", **attributes: float | str) -> ET.Element:
    """An element; `class_` is written as class, and numbers with at most one decimal."""
    written = {name.rstrip("_"): _written(value) for name, value in attributes.items() if value != ""}
    made = ET.Element(tag, written)
    made.text = text.translate(NOT_XML) or None
    made.extend(children)
    return made


def _written(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, line: str, class_: str = "") -> ET.Element:
    return element("text", text=line, x=x, y=y, class_=class_)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> ET.Element:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def kind_class(kind: int) -> str:
    return f"k{kind % NUM_KINDS}" if kind >= 0 else "kn"


def _group(kind: int, tip: str, *children: ET.Element) -> ET.Element:
    """Elements in the color of a kind. tip: shown while the pointer is over them, unless empty."""
    title = [element("title", text=tip)] if tip else []
    return element("g", *title, *children, class_=kind_class(kind))


def _marker(kind: int, x: float, y: float) -> ET.Element:
    return element("path", d=f"M{x:.1f} {y:.1f}{MARKERS[kind % NUM_KINDS]}", class_="point")


# ---- legends


def _legend(keys: Sequence[tuple[ET.Element, str]], top: float) -> tuple[list[ET.Element], float]:
    """Samples with their labels, as many on a line as fit, and the height of all lines."""
    placed, x, y = [], 0.0, top
    for sample, label in keys:
        width = 28 + len(label) * KEY_LETTER + 14
        if x and x + width > WIDTH + 14:
            x, y = 0.0, y + KEY
        placed.append(element("g", sample, text(28, 11, label, "key"), transform=f"translate({x:.1f} {y:g})"))
        x += width
    return placed, y + KEY - top if keys else 0.0


def _line_keys(chart: Chart) -> list[tuple[ET.Element, str]]:
    """One key per measured series, and one for each meaning of dashes."""
    keys = {each.label: (_sample(each), each.label) for each in chart.series if not each.dashed}
    for each in (series for series in chart.series if series.dashed):
        _, colon, meaning = each.label.partition(": ")
        keys.setdefault(meaning or each.label, (_dashes("dash"), f"dashed: {meaning}" if colon else each.label))
    marks = [(_group(MARKED, "", element("path", d="M11 0V14", class_="dash")), "change")] if chart.marks else []
    return [*keys.values(), *marks]


def _row_keys(rows: Rows) -> list[tuple[ET.Element, str]]:
    keys = [(_dashes("reference"), rows.reference_label)]
    keys += [(_group(kind, "", _marker(kind, 11, 7)), meaning) for kind, meaning in rows.keys]
    if any(line.predicted is not None for line in rows.lines):
        keys.append((_line(11, 0, 11, 14, "predicted"), "predicted, prefill excluded"))
    return keys


def _sample(series: Series) -> ET.Element:
    line = [element("path", d="M0 7H22", class_="line")] if series.line else []
    return _group(series.kind, "", *line, _marker(series.kind, 11, 7))


def _dashes(class_: str) -> ET.Element:
    return _group(-1, "", element("path", d="M0 7H22", class_=class_))


def _swatch(kind: int) -> ET.Element:
    return _group(kind, "", element("rect", x=4, y=1, width=14, height=12, class_="part"))


# ---- series over numbers


def _lines(chart: Chart) -> list[ET.Element]:
    y_ticks = _y_ticks(chart)
    left = max(len(label) for _, label in y_ticks) * LETTER + 12
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    y_scale = Scale(y_ticks[0][0], y_ticks[-1][0], base, TOP, chart.log_y)
    x_ticks, x_scale = _x_axis(chart, left)
    middle = max((series.kind for series in chart.series), default=0) / 2
    lines = sorted(chart.series, key=lambda series: not series.dashed)  # measurements on top
    return [
        text(0, 12, chart.y_label, "axis"),
        *(_line(left, y_scale(place), right, y_scale(place), "grid") for place, _ in y_ticks),
        *(text(left - 6, y_scale(place) + 4, label, "end") for place, label in y_ticks),
        _line(left, base, right, base, "base"),
        *(text(x_scale(place), base + 16, label, "mid") for place, label in x_ticks),
        text((left + right) / 2, HEIGHT - 5, chart.x_label, "axis mid"),
        *(_mark(x_scale(place), base, tip) for place, tip in chart.marks),
        *(_series(series, x_scale, y_scale, chart, (series.kind - middle) * 3) for series in lines),
    ]


def _mark(x: float, base: float, tip: str) -> ET.Element:
    """A vertical line over the whole chart."""
    return _group(MARKED, tip, element("path", d=f"M{x:.1f} {TOP:g}V{base:g}", class_="dash"))


def _y_ticks(chart: Chart) -> list[Tick]:
    """Ticks from 0, or in powers of ten, over a range that contains all values and the ends of their intervals."""
    values = [value for series in chart.series for value in series.y]
    if chart.log_y:
        return log_ticks(min(values), max(values))
    highs = [high for series in chart.series for high in series.high or ()]
    lows = [*values, *(low for series in chart.series for low in series.low or ())]
    return ticks(axis_end([*values, chart.y_max], highs), min(lows) if chart.is_zoomed else 0.0)


def _x_axis(chart: Chart, left: float) -> tuple[list[Tick], Scale]:
    places = sorted({place for series in chart.series for place in series.x})
    start, end = left + 16, WIDTH - RIGHT - 16
    if chart.ticks:
        labeled = list(chart.ticks)
    elif chart.log_x:
        labeled = [(place, f"{place:,.0f}") for place in places]
    else:
        labeled = ticks(axis_end(places, [right for series in chart.series for right in series.right or ()]))
        start, end = left, WIDTH - RIGHT
    scale = Scale(min(labeled[0][0], places[0]), max(labeled[-1][0], places[-1]), start, end, chart.log_x)
    return thinned(labeled, scale), scale


def _series(series: Series, x_scale: Scale, y_scale: Scale, chart: Chart, shift: float) -> ET.Element:
    """A line, its points and their intervals. shift: keeps the intervals of several series apart."""
    shift = shift if series.low and series.high and not series.left else 0
    xs, ys = [x_scale(place) + shift for place in series.x], [y_scale(value) for value in series.y]
    joined = list(zip(xs, ys, strict=True))[: len(xs) - series.num_detached]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in joined)
    line = [element("path", d=path, class_="dash" if series.dashed else "line")] if series.line else []
    if series.dashed:
        return _group(series.kind, series.label, *line)
    tips = [f"{label}, {place}: {value}" for label, place, value in points(series, chart)]
    scales = x_scale, y_scale
    drawn = [_point(index, series, scales, *each) for index, each in enumerate(zip(xs, ys, tips, strict=True))]
    return _group(series.kind, "", *line, *drawn)


def _point(index: int, series: Series, scales: tuple[Scale, Scale], x: float, y: float, tip: str) -> ET.Element:
    x_scale, y_scale = scales
    parts = [element("title", text=tip)]
    if series.low and series.high:
        low, high = y_scale(series.low[index]), y_scale(min(series.high[index], y_scale.high))
        cap = f"M{x - 3:.1f} {high:.1f}h6" if series.high[index] <= y_scale.high else ""  # no cap: it goes on
        parts.append(element("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6{cap}"))
    if series.left and series.right:
        left, right = x_scale(series.left[index]), x_scale(min(series.right[index], x_scale.high))
        cap = f"M{right:.1f} {y - 3:.1f}v6" if series.right[index] <= x_scale.high else ""
        parts.append(element("path", d=f"M{left:.1f} {y:.1f}H{right:.1f}M{left:.1f} {y - 3:.1f}v6{cap}"))
    return element("g", *parts, _marker(series.kind, x, y))


# ---- forest plots and stacked bars: each row has its label above a track of its own, so that no line crosses text


def _rows(rows: Rows) -> list[ET.Element]:
    values = [value for line in rows.lines for value in (line.value, line.predicted or line.value)]
    end = axis_end([*values, rows.reference, rows.x_max], [line.high for line in rows.lines])
    labeled = ticks(end, rows.x_min)
    scale = Scale(labeled[0][0], labeled[-1][0], 12, WIDTH - 20)
    bottom = ROW * len(rows.lines)
    return [
        *(part for index, line in enumerate(rows.lines) for part in _row(line, rows, ROW * index, scale, labeled)),
        *(text(scale(place), bottom + 16, label, "mid") for place, label in thinned(labeled, scale)),
        text(WIDTH / 2, bottom + 36, rows.x_label, "axis mid"),
    ]


def _row(line: Line, rows: Rows, top: float, scale: Scale, labeled: Sequence[Tick]) -> list[ET.Element]:
    """The label, and below it a track with the grid and the value."""
    start, reference = top + 18, scale(rows.reference)
    grid = "".join(f"M{scale(place):.1f} {start:g}v18" for place, _ in labeled)
    return [
        text(0, top + 12, shorten(line.label, MAX_LABEL, placeholder="…"), "row"),
        text(WIDTH, top + 12, interval(line, rows), "end row"),
        element("rect", class_="track", x=0, y=start, width=WIDTH, height=18),
        element("path", class_="grid", d=grid),
        _line(reference, start, reference, start + 18, "reference"),
        _value(line, rows, start + 9, scale),
    ]


def _value(line: Line, rows: Rows, y: float, scale: Scale) -> ET.Element:
    low, high = scale(line.low), scale(min(line.high, scale.high))
    cap = f"M{high:.1f} {y - 4:g}v8" if line.high <= scale.high else ""  # no cap: it goes on
    tip = f"{line.label}: {interval(line, rows)}"
    parts = [
        element("path", d=f"M{low:.1f} {y:g}H{high:.1f}M{low:.1f} {y - 4:g}v8{cap}"),
        _marker(line.kind, scale(line.value), y),
    ]
    if line.predicted is not None:
        tip += f", predicted {line.predicted:.2f}"
        parts.append(_line(scale(line.predicted), y - 7, scale(line.predicted), y + 7, "predicted"))
    return _group(line.kind, tip, *parts)


def _bars(bars: Bars) -> list[ET.Element]:
    scale = Scale(0, 1, 0, WIDTH)
    return [part for index, bar in enumerate(bars.bars) for part in _bar(bars, bar, ROW * index, scale)]


def _bar(bars: Bars, bar: tuple[str, str, tuple[float, ...]], top: float, scale: Scale) -> list[ET.Element]:
    label, note, shares = bar
    ends = [sum(shares[:index]) for index in range(len(shares) + 1)]
    drawn = [
        _part(f"{label}: {part} {share:.1%}", kind, scale(ends[kind]), scale(ends[kind + 1]), top + 18, share)
        for kind, (part, share) in enumerate(zip(bars.parts, shares, strict=True))
    ]
    return [text(0, top + 12, label, "row"), text(WIDTH, top + 12, note, "end row"), *drawn]


def _part(tip: str, kind: int, left: float, right: float, top: float, share: float) -> ET.Element:
    rectangle = element("rect", x=left, y=top, width=max(right - left, 0.0), height=16, class_="part")
    label = [text((left + right) / 2, top + 12, f"{share:.0%}", "mid share")] if share >= 0.06 else []
    return _group(kind, tip, rectangle, *label)
