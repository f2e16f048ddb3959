"""Latency and speed-up of each engine, method and gamma, on the same prompts."""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure.session import Session
from bench.records.schema import Cell


# a cell that fails before it measures should say only why
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_speedup(benchmark: Any, session: Session, cell: Cell) -> None:
    """A round is a prompt, or a batch of them. Beside the candidate, which pytest-benchmark times, the same engine's
    autoregressive decoding and the reference engine run on the same prompt; counts are asserted, times never.
    """
    benchmark.extra_info.update(session.run("cells", cell, benchmark))
