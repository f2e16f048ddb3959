"""Charts as SVG for a page: its style sheet has the colours, so that they suit light and dark.

Widths are such that letters can be read where a page is as narrow as a telephone. What a point is can be seen by
pointing at it, and in the table of numbers that `numbers` gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.charts.model import Bars, Chart, Line, Picture, Rows, Series
from bench.report.html.markup import Markup, element, join

WIDTH = 440.0
HEIGHT = 280.0
TOP, BOTTOM, RIGHT = 26.0, 40.0, 16.0
LETTER = 6.3  # mean width of one at 11 px
ROW = 36.0
NUM_KINDS = 8
NUM_TICKS = 5
LONGEST = 3.0  # times the largest value: intervals are shown up to there, and their ends are told in words


@dataclass(frozen=True, slots=True)
class Scale:
    """From numbers, least and most, to places, start and end."""

    least: float
    most: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        least, most, value = (math.log(each) if self.log else each for each in (self.least, self.most, value))
        share = (value - least) / (most - least) if most > least else 0.5
        return self.start + share * (self.end - self.start)


def draw(picture: Picture) -> Markup:
    match picture:
        case Chart():
            return _chart(picture)
        case Bars():
            return _bars(picture)
        case Rows():
            return _rows(picture)


def title(picture: Picture) -> tuple[str, str]:
    """What is shown, and of what."""
    what, _, about = picture.title.partition("\n")
    return what, about


def _image(picture: Picture, height: float, *children: Markup) -> Markup:
    return element(
        "svg", *children, role="img", aria_label=title(picture)[0], viewbox=f"0 0 {WIDTH:g} {height:g}", class_="chart"
    )


def _text(x: float, y: float, text: str, class_: str = "") -> Markup:
    return element("text", text, x=x, y=y, class_=class_ or None)


# ---- lines over numbers


def _chart(chart: Chart) -> Markup:
    y_ticks = _y_ticks(chart)
    left = max(len(label) for _, label in y_ticks) * LETTER + 12
    ends = [place for place, _ in y_ticks]
    y_scale = Scale(ends[0], ends[-1], HEIGHT - BOTTOM, TOP, chart.log_y)
    x_ticks, x_scale = _x_axis(chart, left)
    width = max((series.kind for series in chart.series), default=0) + 1
    lines = sorted(chart.series, key=lambda series: not series.dashed)  # what was measured lies on top
    return _image(
        chart,
        HEIGHT,
        _text(0, 12, chart.y_label, "axis"),
        *(_grid_line(left, y_scale(place), label) for place, label in y_ticks),
        element("line", x1=left, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="base"),
        *(_text(x_scale(place), HEIGHT - BOTTOM + 16, label, "mid") for place, label in x_ticks),
        _text((left + WIDTH - RIGHT) / 2, HEIGHT - 5, chart.x_label, "axis mid"),
        *(_series(series, x_scale, y_scale, chart, (series.kind - (width - 1) / 2) * 3) for series in lines),
    )


def _grid_line(left: float, y: float, label: str) -> Markup:
    return join(
        element("line", x1=left, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"), _text(left - 6, y + 4, label, "end")
    )


def _y_ticks(chart: Chart) -> list[tuple[float, str]]:
    """From 0, or in powers of ten, up to what holds all values and the ends of their intervals."""
    values = [value for series in chart.series for value in series.y]
    if chart.log_y:
        return _log_ticks(min(values), max(values))
    highs = [high for series in chart.series for high in series.high or ()]
    return ticks(most_shown([*values, chart.y_most], highs))


def most_shown(values: Sequence[float], highs: Sequence[float]) -> float:
    """What an axis must reach: one interval that is far longer than others must not press all else together."""
    most = max(values, default=1.0)
    return max([most, *(min(high, LONGEST * most) for high in highs)])


def ticks(most: float) -> list[tuple[float, str]]:
    """Round numbers from 0 to at least the most."""
    if most <= 0:
        return [(0.0, "0"), (1.0, "1")]
    rough = most / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [(step * index, f"{step * index:,.6g}") for index in range(math.ceil(most / step * 0.999) + 1)]


def _log_ticks(least: float, most: float) -> list[tuple[float, str]]:
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    places = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    low = max((place for place in places if place <= least * 1.001), default=places[0])
    high = min((place for place in places if place >= most * 0.999), default=places[-1])
    return [(place, f"{place:,g}") for place in places if low <= place <= high]


def _x_axis(chart: Chart, left: float) -> tuple[list[tuple[float, str]], Scale]:
    places = sorted({place for series in chart.series for place in series.x})
    start, end = left + 16, WIDTH - RIGHT - 16
    if chart.ticks:
        told = list(chart.ticks)
    elif chart.log_x:
        told = [(place, f"{place:,.0f}") for place in places]
    else:
        told = ticks(places[-1])
        start, end = left, WIDTH - RIGHT
    scale = Scale(min(told[0][0], places[0]), max(told[-1][0], places[-1]), start, end, chart.log_x)
    return _thinned(told, scale), scale


def _thinned(told: Sequence[tuple[float, str]], scale: Scale) -> list[tuple[float, str]]:
    """Labels that do not touch each other; the last one stays."""
    kept: list[tuple[float, str]] = []
    for place, label in reversed(told):
        room = (len(label) + len(kept[-1][1])) / 2 * LETTER + 8 if kept else 0
        if not kept or scale(kept[-1][0]) - scale(place) >= room:
            kept.append((place, label))
    return kept[::-1]


def _series(series: Series, x_scale: Scale, y_scale: Scale, chart: Chart, shift: float) -> Markup:
    """A line, its points and their intervals. shift: of points with intervals, which would lie upon each other."""
    has_interval = series.low is not None and series.high is not None
    xs = [x_scale(place) + (shift if has_interval else 0) for place in series.x]
    ys = [y_scale(value) for value in series.y]
    joined = list(zip(xs, ys, strict=True))[: len(xs) - series.num_loose]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in joined)
    line = element("path", d=path, class_="dash" if series.dashed else "line") if series.line else Markup()
    if series.dashed:
        return element("g", element("title", series.label), line, class_=kind_class(series.kind))
    told = zip(xs, ys, points(series, chart), strict=True)
    drawn = [_point(index, series, y_scale, *each) for index, each in enumerate(told)]
    return element("g", line, *drawn, class_=kind_class(series.kind))


def _point(index: int, series: Series, y_scale: Scale, x: float, y: float, told: tuple[str, ...]) -> Markup:
    label, place, value = told
    parts = [element("title", f"{label}, {place}: {value}")]
    if series.low is not None and series.high is not None:
        low, high = y_scale(series.low[index]), y_scale(min(series.high[index], y_scale.most))
        cap = f"M{x - 3:.1f} {high:.1f}h6" if series.high[index] <= y_scale.most else ""  # else it goes on
        parts.append(element("path", d=f"M{x:.1f} {low:.1f}V{high:.1f}M{x - 3:.1f} {low:.1f}h6{cap}"))
    return element("g", *parts, marker(series.kind, x, y))


def points(series: Series, chart: Chart) -> list[tuple[str, str, str]]:
    """(label, place, value with its interval) of each point."""
    names = dict(chart.ticks or ())
    axis = chart.x_label.partition(":")[0].partition(",")[0]
    places = series.names or [f"{axis} {names.get(place, f'{place:,.6g}')}" for place in series.x]
    values = [_with_ends(series, index) for index in range(len(series.y))]
    if series.names:
        values = [f"{y} at {x:.3g}" for x, y in zip(series.x, values, strict=True)]
    return [(series.label, place, value) for place, value in zip(places, values, strict=True)]


def _with_ends(series: Series, index: int) -> str:
    if series.low is None or series.high is None:
        return f"{series.y[index]:.3g}"
    return f"{series.y[index]:.3g} [{series.low[index]:.3g}, {series.high[index]:.3g}]"


def kind_class(kind: int) -> str:
    return f"k{kind % NUM_KINDS}" if kind >= 0 else "kn"


def marker(kind: int, x: float, y: float) -> Markup:
    """Another form for each kind, for those who do not tell colours apart; plain decoding has the last one."""
    shapes = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        "m-3.6 -3.6h7.2v7.2h-7.2z",
        "m0 -5l5 5l-5 5l-5 -5z",
        "m0 -5l4.8 8.6h-9.6z",
        "m0 5l4.8 -8.6h-9.6z",
        "m-1.6 -4.8h3.2v3.2h3.2v3.2h-3.2v3.2h-3.2v-3.2h-3.2v-3.2h3.2z",
        "m-4.8 -2.4l2.4 -2.4l2.4 2.4l2.4 -2.4l2.4 2.4l-2.4 2.4l2.4 2.4l-2.4 2.4l-2.4 -2.4l-2.4 2.4l-2.4 -2.4l2.4 -2.4z",
        "m-6 0l4 -2l2 -4l2 4l4 2l-4 2l-2 4l-2 -4z",
    )
    return element("path", d=f"M{x:.1f} {y:.1f}{shapes[kind % len(shapes)]}", class_="point")


# ---- values below each other, and stacked bars


def _rows(rows: Rows) -> Markup:
    """Each with its name and number above it."""
    values = [value for line in rows.lines for value in (line.value, line.predicted or 0.0)]
    told = ticks(most_shown([*values, rows.reference], [line.high for line in rows.lines]))
    scale = Scale(0, told[-1][0], 12, WIDTH - 20)
    bottom = 14 + ROW * len(rows.lines)
    reference = scale(rows.reference)
    return _image(
        rows,
        bottom + 36,
        *(element("line", x1=scale(place), x2=scale(place), y1=8, y2=bottom, class_="grid") for place, _ in told),
        element("line", x1=reference, x2=reference, y1=8, y2=bottom, class_="reference"),
        *(_row(line, 22 + ROW * index, scale) for index, line in enumerate(rows.lines)),
        *(_text(scale(place), bottom + 14, label, "mid") for place, label in _thinned(told, scale)),
        _text(WIDTH / 2, bottom + 32, rows.x_label, "axis mid"),
    )


def _row(line: Line, y: float, scale: Scale) -> Markup:
    ends = f" [{line.low:.2f}, {line.high:.2f}]" if line.low < line.high else ""
    predicted = "" if line.predicted is None else f", predicted {line.predicted:.2f}"
    middle, low, high = y + 12, scale(line.low), scale(min(line.high, scale.most))
    mark = Markup()
    if line.predicted is not None:
        place = scale(line.predicted)
        mark = element("line", x1=place, x2=place, y1=middle - 7, y2=middle + 7, class_="predicted")
    cap = f"M{high:.1f} {middle - 4:g}v8" if line.high <= scale.most else ""
    whiskers = f"M{low:.1f} {middle:g}H{high:.1f}M{low:.1f} {middle - 4:g}v8{cap}"
    return element(
        "g",
        element("title", f"{line.label}: {line.value:.2f}{ends}{predicted}"),
        _text(8, y, line.label, "row"),
        _text(WIDTH - 8, y, f"{line.value:.2f}{ends}", "end row"),
        element("path", d=whiskers),
        marker(line.kind, scale(line.value), middle),
        mark,
        class_=kind_class(line.kind),
    )


def _bars(bars: Bars) -> Markup:
    scale = Scale(0, 1, 8, WIDTH - 8)
    height = 14 + ROW * len(bars.bars)
    drawn = [_bar(bars, each, 22 + ROW * index, scale) for index, each in enumerate(bars.bars)]
    return _image(bars, height, *drawn)


def _bar(bars: Bars, bar: tuple[str, str, tuple[float, ...]], y: float, scale: Scale) -> Markup:
    label, note, shares = bar
    drawn, start = [], 0.0
    for kind, (part, share) in enumerate(zip(bars.parts, shares, strict=True)):
        drawn.append(_part(f"{label}: {part} {share:.1%}", kind, scale(start), scale(start + share), y, share))
        start += share
    return element("g", _text(8, y, label, "row"), _text(WIDTH - 8, y, note, "end row"), *drawn)


def _part(told: str, kind: int, left: float, right: float, y: float, share: float) -> Markup:
    size = {"x": left, "y": y + 5, "width": max(right - left, 0.0), "height": 14.0}
    parts = [element("title", told), element("rect", **size, class_="part")]
    if share >= 0.06:
        parts.append(_text((left + right) / 2, y + 16, f"{share:.0%}", "mid share"))
    return element("g", *parts, class_=kind_class(kind))


# ---- beside the picture


def legend(picture: Picture) -> Markup:
    """What colours and forms mean."""
    match picture:
        case Chart():
            return element("p", *_chart_legend(picture), class_="legend")
        case Bars():
            kinds = [_key(f"{kind_class(kind)} bar", part) for kind, part in enumerate(picture.parts)]
            return element("p", *kinds, class_="legend")
        case Rows():
            told = [_key("kn reference", "plain decoding")]
            if any(line.predicted is not None for line in picture.lines):
                told.append(_key("kn predicted", "predicted, prompt left out"))
            return element("p", *told, class_="legend")


def _chart_legend(chart: Chart) -> list[Markup]:
    """One key for each measured line; what is dashed says once what dashes mean."""
    solid = [series for series in chart.series if not series.dashed]
    dashed = [series for series in chart.series if series.dashed]
    told = {each.label: _key(kind_class(each.kind), each.label, each) for each in solid}
    for each in dashed:
        _, colon, meaning = each.label.partition(": ")
        told.setdefault(meaning or each.label, _key("kn dash", f"dashed: {meaning}" if colon else each.label))
    return list(told.values())


def _key(classes: str, label: str, series: Series | None = None) -> Markup:
    if series is None:
        return element("span", element("i", class_=classes), label)
    line = element("path", d="M0 7H22", class_="line") if series.line else Markup()
    image = element("svg", line, marker(series.kind, 11, 7), viewbox="0 0 22 14", class_="key", aria_hidden="true")
    return element("span", element("b", image, class_=classes), label)


def numbers(picture: Picture) -> tuple[list[str], list[tuple[str, ...]]]:
    """The same as a table: headings and rows."""
    match picture:
        case Chart():
            rows = [row for series in picture.series for row in points(series, picture)]
            return ["line", "where", picture.y_label], list(rows)
        case Bars():
            shares = [(label, note, *(f"{share:.1%}" for share in parts)) for label, note, parts in picture.bars]
            return ["step", "duration", *picture.parts], shares
        case Rows():
            told = [
                (
                    line.label,
                    f"{line.value:.3g} [{line.low:.3g}, {line.high:.3g}]",
                    "-" if line.predicted is None else f"{line.predicted:.3g}",
                )
                for line in picture.lines
            ]
            return ["cell", picture.x_label, "predicted"], list(told)
