"""The pictures of `bench.report.charts.cost` as PNG files, with matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.report.charts.model import Bars, Chart, Picture, Rows, Series

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart by everybody
MARKERS = "osD^vPX*"


def write(pictures: Sequence[Picture], folder: Path, prefix: str, footer: str) -> list[Path]:
    """Draw the pictures into PNG files FOLDER/PREFIX-NAME.png; returns them. footer: where the numbers come from."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}-{picture.name}.png" for picture in pictures]
    for path, picture in zip(paths, pictures, strict=True):
        draw(picture, footer).savefig(path, dpi=130, metadata={"Software": None})
    return paths


def draw(picture: Picture, footer: str = "") -> Figure:
    """One picture."""
    figure = Figure((8, _height(picture)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(picture.title, loc="left", fontsize=10)
    axes.set_xlabel(picture.x_label)
    axes.spines[["top", "right"]].set_visible(False)
    match picture:
        case Chart():
            handles = _chart(axes, picture)
        case Bars():
            handles = _bars(axes, picture)
        case Rows():
            handles = _rows(axes, picture)
    columns = 2 if isinstance(picture, Chart) else 4
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    legend.set_title(footer, FontProperties(size=6))  # beside the legend text would lie upon it
    legend.get_title().set_color("grey")
    return figure


def _height(picture: Picture) -> float:
    """In inches."""
    match picture:
        case Chart():
            return 4.8
        case Bars():
            return 1.6 + 0.3 * len(picture.bars)
        case Rows():
            return 1.6 + 0.3 * len(picture.lines)


def _chart(axes: Any, chart: Chart) -> list[Any]:
    """Draws it; returns the legend's handles, what was measured before what was computed."""
    handles = [_line(axes, series) for series in sorted(chart.series, key=lambda series: series.dashed)]
    axes.set_ylabel(chart.y_label)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        axes.set_ylim(bottom=0, top=max(chart.y_most, axes.get_ylim()[1]))
    if ticks := chart.ticks or (_ticks(chart) if chart.log_x else None):
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator([place for place, _ in ticks]))
        axes.set_xticklabels([label for _, label in ticks])
    else:
        axes.set_xlim(left=0)
    return handles


def _line(axes: Any, series: Series) -> Any:
    style: dict[str, Any] = {"color": COLOURS[series.kind % len(COLOURS)], "label": series.label}
    if series.dashed:
        return axes.plot(series.x, series.y, linestyle="--", linewidth=1, **style)[0]
    style |= {"marker": MARKERS[series.kind % len(MARKERS)], "markersize": 5}
    style |= {} if series.line else {"linestyle": "none"}
    if series.num_loose:
        axes.plot(series.x[: -series.num_loose], series.y[: -series.num_loose], color=style["color"])
        style["linestyle"] = "none"
    if series.low is None or series.high is None:
        return axes.plot(series.x, series.y, **style)[0]
    below = [value - low for value, low in zip(series.y, series.low, strict=True)]
    above = [high - value for value, high in zip(series.y, series.high, strict=True)]
    places = [place + 0.06 * series.kind for place in series.x]  # intervals beside each other
    return axes.errorbar(places, series.y, yerr=[below, above], capsize=3, **style)


def _ticks(chart: Chart) -> list[tuple[float, str]]:
    """The measured sizes; of many, the powers of two."""
    sizes = sorted({place for series in chart.series for place in series.x})
    powers = [size for size in sizes if not int(size) & (int(size) - 1)]
    return [(size, f"{size:,.0f}") for size in (sizes if len(sizes) < 10 else powers)]


def _bars(axes: Any, bars: Bars) -> list[Any]:
    """Draws them; returns the legend's handles."""
    handles = []
    places = range(len(bars.bars))
    starts = [0.0] * len(bars.bars)
    for index, part in enumerate(bars.parts):
        widths = [shares[index] for _, _, shares in bars.bars]
        drawn = axes.barh(places, widths, left=starts, color=COLOURS[index], label=part, height=0.75)
        handles.append(drawn)
        labels = [f"{width:.0%}" if width >= 0.04 else "" for width in widths]
        axes.bar_label(drawn, labels, label_type="center", color="white", fontsize=7)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(places, [label for label, _, _ in bars.bars], fontsize=8)
    axes.set_ylim(len(bars.bars) - 0.5, -0.5)  # the first one on top
    for place, (_, note, _) in enumerate(bars.bars):
        axes.text(1.01, place, note, va="center", fontsize=8)
    axes.set_xlim(0, 1.1)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    return handles


def _rows(axes: Any, rows: Rows) -> list[Any]:
    """Draws them; returns the legend's handles."""
    axes.axvline(rows.reference, linestyle="--", linewidth=1, color="0.5")
    handles = []
    for place, line in enumerate(rows.lines):
        style: dict[str, Any] = {
            "color": COLOURS[line.kind % len(COLOURS)],
            "marker": MARKERS[line.kind % len(MARKERS)],
        }
        ends = [[line.value - line.low], [line.high - line.value]]
        axes.errorbar([line.value], [place], xerr=ends, capsize=3, markersize=5, **style)
        if line.predicted is not None:
            handles = axes.plot(
                [line.predicted], [place], "|", color="0.3", markersize=12, label="predicted, prompt left out"
            )
    axes.set_yticks(range(len(rows.lines)), [line.label for line in rows.lines], fontsize=8)
    axes.set_ylim(len(rows.lines) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", axis="x")
    axes.set_axisbelow(True)
    return handles
