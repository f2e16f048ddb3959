"""What two runs differ in, in words: for the terminal, and as a chapter of a report."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from bench.analysis.run_diff import INCOMPARABLE, VERDICTS, Difference, differences
from bench.records.results import Results, cell_id
from bench.records.schema import Record
from bench.report.charts.changes import pictures
from bench.report.columns import heading, labels_of, text
from bench.report.document import Card, Chapter, Heading, Table, section, table
from bench.report.format import between
from bench.report.format import verdict as audited

WIDTHS = (41, 19, 23, 23, 8)
MEANING = (
    "Times as fast: the speed-up over plain decoding of the later run over that of the earlier, prompt by prompt, "
    "geometric mean with a 95 % bootstrap interval over prompts; it is called a difference if 1 is outside. Both arms "
    "of a speed-up ran by turns, so that the machine's load cancels. Of cells without any difference one in twenty "
    "looks like one, with few prompts somewhat more. Plain decoding: how many times as fast it was beside each cell: "
    "if not once, the machine or the engine as a whole changed. A cell with nothing beside it (plain decoding itself, "
    "costs) is told by its times, and other times then only say that the machine changed, or all that runs on it. "
    "Outputs: whether all emitted tokens are the same."
)


def lines(before: Results, after: Results) -> Iterator[str]:
    """For the terminal, in at most 120 columns."""
    found = differences(before, after)
    both = [each for each in found if not each.is_lone]
    yield f"{after.name} against {before.name}: {_counted(found)}"
    yield from (_line(("cell", "verdict", "times as fast", "plain decoding", "outputs")),) if both else ()
    labels = labels_of([each.record for each in found])
    for each in both:
        yield from _cell_lines(each, labels)
    yield ""
    yield from textwrap.wrap(MEANING, 118) if both else ()


def _cell_lines(found: Difference, labels: Sequence[str]) -> Iterator[str]:
    is_cost = found.record["axis"] is not None
    name = " ".join(_labels(found.record, ("axis", "size") if is_cost else labels))
    told = (found.verdict, *_numbers(found))
    if len(name) > WIDTHS[0]:  # a long name has a line of its own
        yield name
        name = ""
    yield _line((name, *told))
    for reason in found.reasons:
        yield from textwrap.wrap(reason, 112, initial_indent="    ", subsequent_indent="    ")


def _line(cells: Sequence[str]) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def _numbers(found: Difference) -> tuple[str, str, str]:
    equal = {True: "equal", False: "differ", None: "-"}[found.outputs_equal]
    times, plain = ("-" if each is None else between(each, ".3f") for each in (found.times, found.plain))
    return times, plain, equal


def _counted(found: Sequence[Difference]) -> str:
    counts = Counter(each.verdict for each in found)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    return told or "no times that could be compared"


def chapter(before: Results, after: Results, name: str) -> Chapter:
    """The answer first: how many cells changed which way."""
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
    """What keeps cells from being compared, once for all that have it in common."""
    counts = Counter(reason for each in found if each.verdict == INCOMPARABLE for reason in each.reasons)
    if counts:
        told = "; ".join(f"{reason} ({count} cells)" for reason, count in counts.most_common())
        yield f"Not comparable, because: {told}."


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
    )


def _labels(record: Record, labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(text(record, name) for name in labels)


def _audits(before: Results, after: Results) -> Iterator[Table]:
    """Verdicts of audits that both runs made."""
    earlier, later = ({cell_id(each): each for each in run.certificates} for run in (before, after))
    rows = [(name, audited(earlier[name]), audited(record)) for name, record in later.items() if name in earlier]
    yield table(["audit", "was", "is"], rows, "Audits")
