"""The differences between two runs, as a chapter of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bench.analysis.run_diff import INCOMPARABLE, VERDICTS, Difference, differences
from bench.records.results import Results, cell_id
from bench.records.schema import Record
from bench.report.charts.changes import pictures
from bench.report.columns import heading, labels_of, text
from bench.report.document import Card, Chapter, Heading, Table, section, table
from bench.report.format import interval
from bench.report.format import verdict as audited

MEANING = (
    "Times as fast: the speed-up of the later run over that of the earlier one, prompt by prompt, as a geometric mean "
    "with a 95 % interval; it counts as a difference if the interval excludes 1. Each speed-up was measured "
    "side by side with plain decoding, so the machine's load cancels. One in twenty unchanged cells looks changed. "
    "Plain decoding: its speed in the later run over that in the earlier; if not 1, "
    "the machine or the engine as a whole changed. Cells with nothing beside them (plain decoding itself, costs) are "
    "compared by their times, which can only show that the machine changed, or everything on it. Outputs: whether all "
    "emitted tokens are equal."
)


def _numbers(found: Difference) -> tuple[str, str, str]:
    equal = {True: "equal", False: "differ", None: "-"}[found.outputs_equal]
    times, plain = ("-" if each is None else interval(each, ".3f") for each in (found.times, found.plain))
    return times, plain, equal


def chapter(before: Results, after: Results, name: str) -> Chapter:
    """The answer first: the number of cells that became faster, became slower, or did not change."""
    found = differences(before, after)
    counts = Counter(each.verdict for each in found)
    shown = [verdict for verdict in VERDICTS if counts[verdict]]
    others = len(found) - sum(counts[verdict] for verdict in shown)
    cards = [Card(str(counts[verdict]), f"of {len(found)} cells: {verdict}") for verdict in shown]
    cards += [Card(str(others), f"of {len(found)} cells: only in one of the runs")] if others else []
    known = [each for each in found if each.outputs_equal is not None]
    same = sum(each.outputs_equal is True for each in known)
    cards += [Card(f"{same} of {len(known)}", "cells whose outputs are equal, token for token")] if known else []
    about = (f"the earlier: {before.name}: {before.described()}", f"the later: {after.name}: {after.described()}")
    parts = section(
        "cells",
        "Cell by cell",
        MEANING if found else "",
        *_reasons(found),
        *pictures(before, after, found),
        _table(found),
        *_audits(before, after),
    )
    return Chapter(name, f"What changed: {after.name} against {before.name}", about, tuple(cards), tuple(parts))


def _reasons(found: Sequence[Difference]) -> Iterator[str]:
    """Why cells cannot be compared, each reason once."""
    counts = Counter(reason for each in found if each.verdict == INCOMPARABLE for reason in each.reasons)
    if counts:
        listed = "; ".join(f"{reason} ({count} cells)" for reason, count in counts.most_common())
        yield f"Not comparable because of {listed}."


def _table(found: Sequence[Difference]) -> Table:
    records = [each.record for each in found]
    decoding = all(record["axis"] is None for record in records)
    labels = labels_of(records) if decoding else ["axis", "size"]
    ends = ["verdict", "times as fast [95 %]", "plain decoding [95 %]", "outputs", "why"]
    rows = [
        (*_labels(each.record, labels), each.verdict, *_numbers(each), "; ".join(each.reasons) or "-") for each in found
    ]
    return Table(
        (*(Heading(heading(name), name) for name in labels), *map(Heading, ends)),
        tuple(rows),
        "Each cell of either run",
        sortable=True,
        num_labels=len(labels),
    )


def _labels(record: Record, labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(text(record, name) for name in labels)


def _audits(before: Results, after: Results) -> Iterator[Table]:
    """Verdicts of audits that are in both runs."""
    earlier, later = ({cell_id(each): each for each in run.certificates} for run in (before, after))
    rows = [(name, audited(earlier[name]), audited(record)) for name, record in later.items() if name in earlier]
    yield table(["audit", "was", "is"], rows, "Audits")
