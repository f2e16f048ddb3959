"""Acceptance by category and by turn of a conversation, and cells whose acceptance drifts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.records.intervals import Interval, length_interval, rate_interval
from bench.records.results import kind_of
from bench.records.schema import Record
from bench.records.trends import FALSE_ALARM_RATE

DRIFTS = ("text_drift", "service_drift")


@dataclass(frozen=True, slots=True)
class Group:
    """The prompts or requests of a cell that share a category or turn, named by `value`."""

    value: str
    num_prompts: int
    acceptance_rate: Interval | None
    mean_acceptance_length: Interval | None


def groups(record: Record, name: str) -> list[Group]:
    """The groups of a cell that drafted, in order of their names; none if all are alike. name: category or turn."""
    each = "per_request" if kind_of(record) == "loads" else "per_prompt"
    columns = [record.get(f"{each}_{column}") for column in (name, "steps", "emitted", "drafted", "accepted")]
    if None in columns or not record.get("num_drafted"):
        return []
    columns.append(record.get(f"{each}_conversation") or [*range(len(columns[0] or ()))])
    rows = [row for row in zip(*(column or () for column in columns), strict=True) if row[1] is not None]
    values = sorted({row[0] for row in rows})
    return [_group(value, [row for row in rows if row[0] == value]) for value in values] if len(values) > 1 else []


def _group(value: str | int, rows: Sequence[Sequence[int]]) -> Group:
    _, steps, emitted, drafted, accepted, clusters = zip(*rows, strict=True)
    rate, length = rate_interval(accepted, drafted, clusters), length_interval(emitted, steps, clusters)
    return Group(str(value), len(rows), rate, length)


def drifting(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    """The cells with a drift, and its field: without drift, each test of a cell finds one with FALSE_ALARM_RATE."""
    for record in records:
        for name in DRIFTS:
            p_value = record.get(f"{name}_p_value")
            if p_value is not None and p_value <= FALSE_ALARM_RATE:
                yield record, name


def num_tested(records: Iterable[Record]) -> int:
    """The number of tests of drift."""
    return sum(record.get(f"{name}_p_value") is not None for record in records for name in DRIFTS)
