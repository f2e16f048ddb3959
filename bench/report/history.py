"""The report on many runs of the same cells, as of a nightly job: where their level changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.analysis.history import FALSE_ALARM_RATE, METRICS, Change, Series, histories
from bench.records.results import Results
from bench.report import chapters
from bench.report.charts.history import chart
from bench.report.columns import heading, labels_of, text
from bench.report.document import Card, Chapter, Document, Heading, Table, section, table
from bench.report.format import cell_name

MEANING = (
    "A change is marked where the level of a series differs most before and after, if so large a difference is rare "
    f"among random orders of the same values; of pages without any change {100 * FALSE_ALARM_RATE:g} % mark one. A "
    "clear change is marked after about four runs; --fail-on slower compares two. Speed-ups are measured beside plain "
    "decoding in each run, so that they can be compared over time. Another machine, version or commit is named where "
    "it came with a change."
)
TITLES = {
    "speedup": "Speed-up over plain decoding",
    "speedup_of_reference": "Plain decoding beside other engines",
    "mean_acceptance_length": "Acceptance length",
}


def document(runs: Sequence[Results]) -> Document:
    """The report on runs of any number of cells."""
    found = histories(runs)
    glossary = chapters.glossary([series.record for series in found])
    return Document("Speculative decoding over time", (_chapter(runs, found),), glossary)


def _chapter(runs: Sequence[Results], found: Sequence[Series]) -> Chapter:
    dates = sorted(run.date[:10] for run in runs)
    latest = max(runs, key=lambda run: run.date)
    ordered = sorted(found, key=lambda series: not series.changes)  # those that changed come first
    labels = labels_of([series.record for series in found]) if found else []
    charts = {metric: [chart(each) for each in ordered if each.metric == metric] for metric in METRICS}
    sections = [
        *section("changes", "Changes of level", MEANING, _changes(found, labels)),
        *(part for metric in METRICS for part in section(metric, TITLES[metric], *charts[metric])),
        *section("series", "All series", _series(found, labels)),
    ]
    title = f"{len(runs)} runs from {dates[0]} to {dates[-1]}"
    about = (f"the latest: {latest.name}: {latest.described()}",)
    return Chapter("trends", title, about, _cards(found), tuple(sections))


def _cards(found: Sequence[Series]) -> tuple[Card, ...]:
    """How many series changed, and the largest change of each metric."""
    changed = [series for series in found if series.changes]
    cards = [Card(f"{len(changed)} of {len(found)}", "series have a change of level")]
    for metric in METRICS:
        pairs = [(each, series) for series in changed if series.metric == metric for each in series.changes]
        if pairs:
            change, series = max(pairs, key=lambda pair: abs(pair[0].after / pair[0].before - 1))
            since = series.points[change.at].run.date[:10]
            name = f"{_name(metric)} of {cell_name(series.record)} since {since}, the largest such change"
            cards.append(Card(f"{change.after / change.before - 1:+.1%}", name))
    return tuple(cards)


def _changes(found: Sequence[Series], labels: Sequence[str]) -> Table:
    rows = [
        (*_labels(series, labels), *_numbers(change), *_origin(series, change))
        for series in found
        for change in series.changes
    ]
    ends = ["before", "after", "change", "p", "since", "what else changed there"]
    return table(
        [*_headings(labels), *ends],
        rows,
        "Each change: the mean of the level before, and of the level after",
        len(labels) + 1,
    )


def _numbers(change: Change) -> tuple[str, ...]:
    share = change.after / change.before - 1
    return f"{change.before:.3f}", f"{change.after:.3f}", f"{share:+.1%}", f"{change.p_value:.2g}"


def _origin(series: Series, change: Change) -> tuple[str, str]:
    """The run of a change, and how it differs from the run before."""
    before, after = series.points[change.at - 1].run, series.points[change.at].run
    commits = [f"commit {before.commit} to {after.commit}"] if before.commit != after.commit else []
    return f"{after.date[:10]} ({after.name})", "; ".join([*commits, *change.circumstances]) or "-"


def _series(found: Sequence[Series], labels: Sequence[str]) -> Table:
    rows = [
        (
            *_labels(series, labels),
            str(len(series.points)),
            str(len(series.changes)),
            f"{series.points[0].value:.3f}",
            f"{series.points[-1].value:.3f}",
            f"{min(point.value for point in series.points):.3f}",
            f"{max(point.value for point in series.points):.3f}",
        )
        for series in found
    ]
    ends = ["runs", "changes", "first", "latest", "least", "most"]
    shown = table([*_headings(labels), *ends], rows, "Every series", len(labels) + 1)
    return replace(shown, sortable=True)


def _headings(labels: Sequence[str]) -> list[Heading | str]:
    return [*(Heading(heading(name), name) for name in labels), "value"]


def _labels(series: Series, labels: Sequence[str]) -> Iterator[str]:
    yield from (text(series.record, name) for name in labels)
    yield _name(series.metric)


def _name(metric: str) -> str:
    return heading(metric).removesuffix(" [95 %]").replace("reference is faster", "speed of the reference")
