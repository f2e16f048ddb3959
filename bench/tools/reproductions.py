"""Fill the tables of `baselines/reproductions.md` from committed results: `python -m bench.tools.reproductions`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BASELINES = Path(__file__).parents[1] / "baselines"
PAGE = BASELINES / "reproductions.md"
BLOCK = re.compile(r"<!-- (reproduction-[\w-]+): begin -->\n.*?<!-- \1: end -->", re.DOTALL)
HEADINGS = ("engine", "method", "gamma", "accepted", "tokens per call", "speed-up", "predicted", "quality", "power")
Record = dict[str, Any]


def records_of(name: str) -> list[Record]:
    """The records of a committed run."""
    run = json.loads((BASELINES / f"{name}.json").read_text())
    return [each["extra_info"] for each in run["benchmarks"]]


def table(records: Sequence[Record]) -> str:
    """A table of speculative cells in Markdown, and below it why there is no power, where there is none."""
    rows = [
        HEADINGS,
        ["---"] * len(HEADINGS),
        *(_cells(each) for each in records if each["method"] != "autoregressive"),
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    reasons = {each["energy_reason"] for each in records if each["energy_reason"]}
    return "\n".join([*lines, "", *(f"No power: {reason}." for reason in sorted(reasons))]).rstrip()


def filled(page: str) -> str:
    """The page with each table regenerated from its run."""
    return BLOCK.sub(lambda found: _block(found[1]), page)


def _block(name: str) -> str:
    return f"<!-- {name}: begin -->\n{table(records_of(name))}\n<!-- {name}: end -->"


def _cells(record: Record) -> list[str]:
    """A cell's row, with a dash for unknown values."""

    def show(name: str, form: str) -> str:
        return "-" if record[name] is None else format(record[name], form)

    interval = f" [{show('speedup_low', '.2f')}, {show('speedup_high', '.2f')}]"
    return [
        record["engine"],
        record["method"],
        str(record["gamma"]),
        show("acceptance_rate", ".0%"),
        show("mean_acceptance_length", ".2f"),
        show("speedup", ".2f") + interval,
        show("predicted_speedup", ".2f"),
        _quality(record),
        "-" if record["average_power_w"] is None else f"{record['average_power_w']:.0f} W",
    ]


def _quality(record: Record) -> str:
    """The score of plain decoding, and of speculative decoding."""
    if record["quality"] is None or record["quality_baseline"] is None:
        return "-"
    name = record["quality_metric"].replace("_", " ")
    return f"{name} {record['quality_baseline']:.3f}, {record['quality']:.3f}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
