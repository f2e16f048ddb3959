"""Charts as text: tooltips, a description for screen readers, and a table of the values."""

from __future__ import annotations

from bench.report.charts.model import Bars, Chart, Line, Picture, Rows, Series


def heading(picture: Picture) -> tuple[str, str]:
    """The title of a chart, and its models and prompts."""
    what, _, about = picture.title.partition("\n")
    return what, about


def describe(picture: Picture) -> str:
    """A sentence that describes the chart, for screen readers."""
    match picture:
        case Chart():
            spans = "; ".join(_span(series, picture) for series in picture.series)
            marks = "".join(f" {tip.capitalize()}." for _, tip in picture.marks)
            return f"{picture.y_label}, by {picture.x_label}. {spans}.{marks}"
        case Bars():
            rows = [f"{label}: {note}" for label, note, _ in picture.bars]
            return f"{picture.x_label}, divided into {', '.join(picture.parts)}. {'; '.join(rows)}."
        case Rows():
            rows = [f"{line.label}: {interval(line, picture)}" for line in picture.lines]
            return f"{picture.x_label}. {'; '.join(rows)}."


def _span(series: Series, chart: Chart) -> str:
    """A series by its first and last point."""
    ends = [f"{value} at {place}" for _, place, value in points(series, chart)]
    return f"{series.label}: {' to '.join(dict.fromkeys((ends[0], ends[-1])))}"


def points(series: Series, chart: Chart) -> list[tuple[str, str, str]]:
    """(label, place, value with its interval) of each point."""
    names = dict(chart.ticks or ())
    axis = chart.x_label.partition(":")[0].partition(",")[0]
    places = series.names or [f"{axis} {names.get(place, f'{place:,.6g}')}" for place in series.x]
    values = [_with_ends(series, index) for index in range(len(series.y))]
    if series.names:
        values = [f"{value} at {_x_with_ends(series, index)}" for index, value in enumerate(values)]
    return [(series.label, place, value) for place, value in zip(places, values, strict=True)]


def _with_ends(series: Series, index: int) -> str:
    if not (series.low and series.high):
        return f"{series.y[index]:.3g}"
    return f"{series.y[index]:.3g} [{series.low[index]:.3g}, {series.high[index]:.3g}]"


def _x_with_ends(series: Series, index: int) -> str:
    if not (series.left and series.right):
        return f"{series.x[index]:.3g}"
    return f"{series.x[index]:.3g} [{series.left[index]:.3g}, {series.right[index]:.3g}]"


def interval(line: Line, rows: Rows) -> str:
    """The value of a row with the ends of its interval, if it has one."""
    value, low, high = (f"{each:.{rows.digits}f}" for each in (line.value, line.low, line.high))
    return f"{value} [{low}, {high}]" if line.low < line.high else value


def numbers(picture: Picture) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headings and rows with the values of a chart."""
    match picture:
        case Chart():
            rows = [row for series in picture.series for row in points(series, picture)]
            return ["series", "at", picture.y_label], list(rows)
        case Bars():
            shares = [(label, note, *(f"{share:.1%}" for share in parts)) for label, note, parts in picture.bars]
            return ["step", "duration", *picture.parts], shares
        case Rows():
            predicted = ["-" if line.predicted is None else f"{line.predicted:.2f}" for line in picture.lines]
            labels = [(line.label, interval(line, picture)) for line in picture.lines]
            return ["cell", picture.x_label, "predicted"], [
                (*label, each) for label, each in zip(labels, predicted, strict=True)
            ]
