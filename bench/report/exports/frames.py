"""Records as typed columns: a pandas data frame, and a Parquet file.

A row for each cell and a column for each field that is one value, in SI units, as in the CSV file; and the run's date
and commit, by which rows of many runs are ordered. pyarrow and pandas are imported when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.records import fields
from bench.records.results import Results, kind_name

INSTALL = "pip install -e '.[frames]'"
RUN_COLUMNS = ("run", "date", "commit", "kind")


def rows(runs: Sequence[Results]) -> list[dict[str, Any]]:
    """All cells of all runs, with the values of fields as they are."""
    return [
        {"run": run.name, "date": run.date, "commit": run.commit, "kind": kind_name(record)} | fields.scalars(record)
        for run in runs
        for record in run.records
    ]


def frame(runs: Sequence[Results]) -> Any:
    """A pandas.DataFrame of all cells. Raises ValueError with the remedy without pyarrow or pandas."""
    try:
        import pandas  # noqa: F401  # pyarrow needs it
    except ImportError as error:
        raise ValueError(f"a data frame needs pandas ({error}); {INSTALL}") from error
    return _table(runs).to_pandas()


def write_parquet(runs: Sequence[Results], path: Path) -> None:
    """Write all cells as a Parquet file. Raises ValueError without pyarrow, and for a file that cannot be written."""
    table = _table(runs)
    from pyarrow import parquet

    try:
        with path.open("wb") as stream:
            parquet.write_table(table, stream)
    except OSError as error:
        raise ValueError(f"parquet={path} must be a writable file ({error.strerror}); name another") from error


def _table(runs: Sequence[Results]) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"typed columns need pyarrow ({error}); {INSTALL}") from error
    found = rows(runs)
    names = [*RUN_COLUMNS, *fields.ordered({name for row in found for name in row} - set(RUN_COLUMNS))]
    return pyarrow.table({name: _column(pyarrow, name, [row.get(name) for row in found]) for name in names})


def _column(pyarrow: Any, name: str, values: Sequence[Any]) -> Any:
    """A column of a field's declared type; of text if that is not one type (gamma), or not declared."""
    declared = fields.field(name).type
    convert: Callable[[Any], Any] = str
    kind = pyarrow.string()
    if declared is int:
        convert, kind = int, pyarrow.int64()
    elif declared is float:
        convert, kind = float, pyarrow.float64()
    return pyarrow.array([None if value is None else convert(value) for value in values], kind)
