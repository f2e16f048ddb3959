"""Closed-loop cells: the arms that are decoded in turns."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.measure.cells.closed_loop import ClosedLoop
from bench.measure.paired import BASELINE, CANDIDATE, REFERENCE
from bench.records.schema import Cell

SPECDEC = Cell("specdec", "tiny-random", "draft_model", 2, "same", "smoke", 1)
TRANSFORMERS = Cell("transformers", "tiny-random", "draft_model", 2, "same", "smoke", 1)


@pytest.mark.parametrize("refusal", [None, "the draft's tokenizer must be the target's"])
def test_a_reference_engine_that_refuses_the_draft_is_left_out(
    refusal: str | None, make_config: Callable[..., BenchConfig]
) -> None:
    config = make_config(engines=("transformers", "specdec"))
    models: Any = SimpleNamespace(why_no_draft=lambda engine, method, pair: refusal)
    context: Any = SimpleNamespace(config=config, models=models)
    assert config.reference_engine == "transformers"
    arms = ClosedLoop(context, frozenset({SPECDEC, TRANSFORMERS}))._arm_cells(SPECDEC)
    assert set(arms) == {CANDIDATE, BASELINE} | (set() if refusal else {REFERENCE})
