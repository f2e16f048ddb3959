"""SPEED-Bench (NVIDIA 2026, arXiv:2604.09557), from a folder that its own script has built.

Its license forbids redistribution, so there is only this reader. `prepare_data.py` of NVIDIA/Model-Optimizer,
examples/specdec_bench, writes one folder per split, each with `test.parquet`, whose rows have `category` and `turns`:
qualitative, with 80 prompts in each of 11 categories, and throughput_1k, 2k, 8k, 16k and 32k, named by the tokens of an
input (in the o200k tokenizer), whose categories are tiers of entropy.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, conversation, find, prompts_of
from bench.workloads.sources import rows_of
from specdec.prompts import text_of

SPLITS = {
    "speed_bench": "qualitative",
    **{f"speed_bench_{size}": f"throughput_{size}" for size in ("1k", "2k", "8k", "16k", "32k")},
}
UNRESOLVED = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # begins a text of the hub's files that the script has to fetch


def read(data_dir: Path | None, malformed: Malformed, *, workload: str) -> list[Prompt]:
    """The conversations of a split, as Parquet or JSON lines. workload: one of SPLITS."""
    split = SPLITS[workload]
    names = (f"{split}/{name}" for name in ("test.parquet", "test.jsonl"))
    patterns = [f"{folder}{name}" for name in names for folder in ("", "speed/", "data/speed/")]
    rows = rows_of(find(data_dir, workload, *patterns), malformed)
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    found = conversation(row, place, text_of(row, "category", place))
    if any(text.startswith(UNRESOLVED) for text in (found.text, *found.later)):
        raise ValueError(
            f"{place}: turns must be complete, but their source is still to be fetched; run prepare_data.py"
        )
    return found


READERS = {name: partial(read, workload=name) for name in SPLITS}
