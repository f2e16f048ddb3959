"""Load: `pytest bench/ --rate 2,4`, `--concurrency 1,4` or `--sweep` measures each engine and method at each level."""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure.session import Session
from bench.records.schema import Cell, Gamma


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_load(
    benchmark: Any,
    session: Session,
    engine: str,
    pair: str,
    method: str,
    gamma: Gamma,
    placement: str,
    workload: str,
    batch_size: int,
    rate: float | None,
    concurrency: int | None,
) -> None:
    """Requests arrive for --duration and are drained: the only round. Counts are asserted, times never."""
    cell = Cell(engine, pair, method, gamma, placement, workload, batch_size, rate, concurrency)
    if reason := session.why_saturated(cell):
        pytest.skip(reason)
    benchmark.extra_info.update(session.run("loads", cell, benchmark))
