"""The tables and sentences of a report on acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.analysis.acceptance import drifting, groups, num_tested
from bench.records import fields
from bench.records.grouping import fastest, grouped
from bench.records.intervals import Interval
from bench.records.results import Results
from bench.records.schema import CELL_FIELDS, Record
from bench.records.trends import FALSE_ALARM_RATE
from bench.report.columns import heading, labels_of, shown, text
from bench.report.document import Heading, Part, Table, table
from bench.report.format import cell_name, interval

POSITION_RATES = ("acceptance_rate_at", "conditional_acceptance_rate_at")


def parts(run: Results) -> Iterator[Part]:
    """What is not known, and acceptance by draft position, category and turn, and its drift."""
    yield from _reasons([record for record in (*run.cells, *run.loads) if record["acceptance_reason"]])
    records = [*_shown_by_position(run.cells), *run.loads]
    yield _by_position([record for record in records if record["conditional_acceptance_rate_at"]])
    drafted = [record for record in (*run.cells, *run.loads) if record["num_drafted"]]
    yield _by_group(drafted, "category")
    yield _by_group(drafted, "turn")
    tested = [record for record in drafted if num_tested([record])]
    if tested:
        yield _drift_sentence(tested)
        yield shown(tested, "drift", "Drift of the acceptance length")


def _reasons(records: Sequence[Record]) -> Iterator[str]:
    """Why counters are missing, each reason once with its engines."""
    for reason, group in grouped(records, "acceptance_reason").items():
        engines = ", ".join(dict.fromkeys(str(record["engine"]) for record in group))
        yield f"No counters of drafted and accepted tokens ({engines}): {reason}."


def _shown_by_position(cells: Sequence[Record]) -> list[Record]:
    """The fastest cell of each method, and those without a speed-up to choose by."""
    names = [name for name in CELL_FIELDS if name != "gamma"]
    alone = [cell for group in grouped(cells, *names).values() for cell in group if len(group) == 1]
    return list({id(cell): cell for cell in (*fastest(cells), *alone)}.values())


def _by_position(records: Sequence[Record]) -> Table:
    labels = labels_of(records) if records else []
    rows = [
        (
            *(text(record, name) for name in labels),
            str(position + 1),
            *(_rate_at(record, name, position) for name in POSITION_RATES),
            str(record["acceptance_histogram"][position + 1]),
        )
        for record in records
        for position in range(len(record["acceptance_rate_at"]))
    ]
    headings: list[Heading | str] = [Heading(heading(name), name) for name in labels]
    headings += ["position", "of all steps [95 %]", "given the one before [95 %]", "steps that end there"]
    caption = "Accepted by draft position, each method at its fastest gamma"
    return table(headings, rows, caption, len(labels) + 1)


def _rate_at(record: Record, name: str, position: int) -> str:
    values = [record[f"{name}{end}"][position] for end in ("", "_low", "_high")]
    return "-" if values[0] is None else interval(Interval(*values), ".1%")


def _by_group(records: Sequence[Record], name: str) -> Table:
    labels = labels_of(records) if records else []
    rows = [
        (
            *(text(record, label) for label in labels),
            group.value or "none",
            str(group.num_prompts),
            *(
                interval(found, fields.field(field).form) if found else "-"
                for field, found in (
                    ("acceptance_rate", group.acceptance_rate),
                    ("mean_acceptance_length", group.mean_acceptance_length),
                )
            ),
        )
        for record in records
        for group in groups(record, name)
    ]
    headings: list[Heading | str] = [Heading(heading(label), label) for label in labels]
    headings += [name, "prompts"]
    headings += [Heading(heading(field), field) for field in ("acceptance_rate", "mean_acceptance_length")]
    return table(headings, rows, f"Acceptance by {name}", len(labels) + 1)


def _drift_sentence(records: Sequence[Record]) -> str:
    """The cells whose acceptance drifts, and how many would seem to by chance."""
    found = [f"{cell_name(record)} {_DRIFT_OF[name]}" for record, name in drifting(records)]
    number = num_tested(records)
    what = f"Drift of the acceptance length: {', '.join(found)}" if found else "No drift of the acceptance length found"
    tests = f"{number} test" + ("s" if number > 1 else "")
    return f"{what} ({tests}, each with a false-alarm rate of {FALSE_ALARM_RATE:.0%})."


_DRIFT_OF = {"text_drift": "within a text", "service_drift": "over the time of service"}
