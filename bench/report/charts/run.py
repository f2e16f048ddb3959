"""All charts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.records.results import kind_of
from bench.report.charts import cost, decoding, drift, load
from bench.report.charts.model import Picture

Record = dict[str, Any]


def pictures(records: Sequence[Record]) -> list[Picture]:
    """All charts whose values the records have."""
    return [picture for section in sections(records).values() for picture in section]


def sections(records: Sequence[Record]) -> dict[str, list[Picture]]:
    """Charts by section of the report, in its order."""
    costs = [record for record in records if record.get("axis") is not None]
    loads = [record for record in records if kind_of(record) == "loads"]
    cells = [record for record in records if kind_of(record) == "cells"]
    found = decoding.sections(cells)
    found["acceptance"] += drift.over_text(cells, decoding.kinds_of(cells))
    service = drift.over_service(loads, decoding.kinds_of(loads))
    return {**found, "load": [*load.charts(loads), *service], "cost": list(cost.charts(costs))}
