"""Certificates: `pytest bench/ -m equivalence` audits each engine and method; other runs leave this out."""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure.session import Session
from bench.records.schema import Cell


@pytest.mark.equivalence
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_equivalence(benchmark: Any, session: Session, cell: Cell) -> None:
    """The audit of a cell is its only round. A lossy engine fails; what is inconclusive says what it needs."""
    record = session.run("certificates", cell, benchmark)
    benchmark.extra_info.update(record)
    assert record["verdict"] != "lossy", "; ".join(record["reasons"])
