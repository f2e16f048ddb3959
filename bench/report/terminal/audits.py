"""Certificates of equivalence audits, one line each."""

from __future__ import annotations

from collections.abc import Sequence

from bench.records.schema import Record
from bench.report.format import verdict


def lines(records: Sequence[Record]) -> list[str]:
    """A line for each certificate."""
    return [_line(record) for record in records]


def _line(record: Record) -> str:
    return (
        f"{verdict(record):<20} {record['engine']} {record['method']} {record['gamma']}, {record['verification']}: "
        f"p = {record['p_value']:.2g} (plain decoding {record['control_p_value']:.2g}), {record['num_draws']} tokens, "
        f"would have shown a distance of {record['min_detectable_tv']:.3f}"
    )
