"""Records as tables: the columns of a table are the fields that `bench.records.fields` declares for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.records import fields
from bench.records.intervals import Interval
from bench.records.results import kind_of
from bench.records.schema import LEVELS, Record
from bench.report.document import Heading, Table
from bench.report.format import interval, verdict

SETTINGS = ("pair", "workload", "batch_size", "placement", *LEVELS)  # name a cell in a table where they vary


def shown(records: Sequence[Record], tables: str, caption: str = "", labels: Sequence[str] | None = None) -> Table:
    """One row per record: its identifying columns, and the fields of the named tables that at least one record has."""
    if not records:
        return Table((), ())
    labels = labels_of(records) if labels is None else labels
    declared = dict.fromkeys(field.name for name in tables.split() for field in fields.shown_in(name))
    names = [name for name in declared if any(record.get(name) is not None for record in records)]
    reference = records[0].get("reference_engine") or "reference"
    known = fields.names(kind_of(records[0]))
    headings = [Heading(_heading(name, known).replace("reference", reference), name) for name in (*labels, *names)]
    rows = [tuple(text(record, name) for name in (*labels, *names)) for record in records]
    return Table(tuple(headings), tuple(rows), caption, num_labels=len(labels))


def labels_of(records: Sequence[Record]) -> list[str]:
    """The name of a cell among these: engine, method and gamma, preceded by the fields that vary."""
    varying = [name for name in SETTINGS if len({str(record.get(name)) for record in records}) > 1]
    return [*varying, "engine", "method", "gamma"]


def heading(name: str) -> str:
    return fields.field(name).title


def _heading(name: str, known: set[str]) -> str:
    """Without the mark of an interval if this kind of record has none. known: its fields."""
    has_interval = set(fields.field(name).ends) <= known
    return heading(name) if has_interval else heading(name).removesuffix(fields.INTERVAL)


def text(record: Record, name: str) -> str:
    """A field of a record as tables show it."""
    if name in _FROM_RECORD:
        return _FROM_RECORD[name](record)
    field = fields.field(name)
    if field.ends and (value := record.get(name)) is not None:
        low, high = (record.get(each) for each in field.ends)
        return interval(Interval(value, low, high), field.form)
    return " ".join(field.text(record.get(each)) for each in (name, *field.beside))


def _same(record: Record) -> str:
    equal = record["num_outputs_equal"]
    equal = record["num_outputs_equal_reference"] if equal is None else equal
    return "-" if equal is None else f"{equal} of {record['num_prompts']}"


def _finished(record: Record) -> str:
    return f"{record['num_finished']} of {record['num_requests']}"


_FROM_RECORD: dict[str, Callable[[Record], str]] = {
    "num_outputs_equal": _same,
    "num_finished": _finished,
    "verdict": verdict,
}
