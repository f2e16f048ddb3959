"""Time of a step against its size, beside what reading its weights and its cache must take at the least.

`pytest bench/cost_sweep.py` runs it; `pytest bench/` does not, whose cells have other parameters.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.measure.cost.sweep import CostCell
from bench.measure.session import Session


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_cost(benchmark: Any, session: Session, axis: str, size: int) -> None:
    """A round is one step of that size; the roofline is measured first, in the same run."""
    benchmark.extra_info.update(session.run("costs", CostCell(axis, size), benchmark))
