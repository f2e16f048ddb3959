"""Charts of a metric over many runs, one for each series, with its levels and changes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import bench.analysis.history as analysis
from bench.report.charts import names
from bench.report.charts.model import Chart, Series

Y_LABELS = {
    "speedup": "speed-up over plain decoding [95 %]",
    "speedup_of_reference": "speed of the reference engine over this one's [95 %]",
    "mean_acceptance_length": "tokens per target call [95 %]",
}


def chart(series: analysis.Series) -> Chart:
    """A point for each run with its interval, the levels between changes as lines, and each change as a mark."""
    record, points = series.record, series.points
    x, y = tuple(map(float, range(len(points)))), tuple(point.value for point in points)
    low, high = (tuple(getattr(point, end) or point.value for point in points) for end in ("low", "high"))
    measured = Series(names.arm(record["method"], record["gamma"]), x, y, 0, low, high, line=False)
    dates = [point.run.date[:10] for point in points]
    return Chart(
        names.name(f"trend-{series.metric}-{record['method']}-{record['gamma']}", record),
        f"{names.arm(record['method'], record['gamma'])}: {record['engine']}\n{names.about(record)}",
        "run, by date",
        Y_LABELS[series.metric],
        (measured, *_levels(series)),
        ticks=tuple((float(index), date[5:]) for index, date in enumerate(dates)),
        is_zoomed=True,
        marks=tuple((each.at - 0.5, f"change at the run of {dates[each.at]}") for each in series.changes),
    )


def _levels(series: analysis.Series) -> Iterator[Series]:
    """Dashed lines from the first to the last run of each level, if there is more than one."""
    if not series.changes:
        return
    ends = [0, *(each.at for each in series.changes), len(series.points)]
    levels = [series.changes[0].before, *(each.after for each in series.changes)]
    for (start, end), level in zip(pairwise(ends), levels, strict=True):
        yield Series("mean between changes", (start - 0.4, end - 0.6), (level, level), -1, dashed=True)
