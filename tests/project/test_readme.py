"""The README: short, and its numbers are those of the committed run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = re.search(r"<!-- results: (\S+) -->\n((?:\|.*\n)+)", README)
MAX_WORDS = 1000


def test_it_is_short() -> None:
    assert len(README.split()) <= MAX_WORDS


def cells() -> list[dict[str, Any]]:
    """Records of the run that the table of results names."""
    assert RESULTS
    return [each["extra_info"] for each in json.loads((ROOT / RESULTS[1]).read_text())["benchmarks"]]


def shown(cell: dict[str, Any]) -> str:
    """A record as a row of the table."""
    speedup = "1"
    if cell["speedup"]:
        speedup = f"{cell['speedup']:.2f} [{cell['speedup_low']:.2f}, {cell['speedup_high']:.2f}]"
    gamma = "auto" if cell["gamma"] == "auto" else f"gamma {cell['gamma']}"
    method = "plain" if cell["method"] == "autoregressive" else f"{cell['method']}, {gamma}"
    accepted = "-" if cell["acceptance_rate"] is None else f"{cell['acceptance_rate']:.0%}".replace("%", " %")
    return f"| {cell['engine']} | {method} | {cell['throughput_tok_s']:.1f} | {accepted} | {speedup} |"


@pytest.mark.parametrize("engine", ["specdec", "transformers", "vllm"])
def test_the_results_are_those_of_the_committed_run(engine: str) -> None:
    """For each engine plain decoding and its fastest method, as stated below the table."""
    assert RESULTS
    measured = sorted((cell for cell in cells() if cell["engine"] == engine), key=lambda cell: cell["throughput_tok_s"])
    (plain,) = (cell for cell in measured if cell["method"] == "autoregressive")
    rows = RESULTS[2].splitlines()[2:]
    assert len(rows) == 6
    assert [row for row in rows if row.startswith(f"| {engine} |")] == [shown(plain), shown(measured[-1])]
