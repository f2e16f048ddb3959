"""Records as CSV: a row for each cell, a column for each field that is one value, in SI units."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from bench.records import fields
from bench.records.results import Results, kind_name
from bench.records.schema import Record


def render(runs: Sequence[Results]) -> str:
    """All cells of all runs. Columns follow the order of the glossary, then the alphabet.

    run: the file's name. kind: of the record, in the singular. A field that a cell lacks, or that is unknown, is empty.
    """
    rows = [
        {"run": inert(run.name), "kind": kind_name(record), **_scalars(record)}
        for run in runs
        for record in run.records
    ]
    names = ["run", "kind", *fields.ordered({name for row in rows for name in row} - {"run", "kind"})]
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def inert(text: str) -> str:
    """An untrusted text, quoted if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _scalars(record: Record) -> dict[str, Any]:
    """Single values; numbers may start with a minus."""
    values = fields.scalars(record).items()
    return {inert(name): inert(value) if isinstance(value, str) else value for name, value in values}
