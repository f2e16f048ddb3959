"""MT-Bench (Zheng et al. 2023, arXiv:2306.05685): 80 conversations of two turns, in eight categories.

Rows with `category` and `turns`; the second turn is asked with --turns all. Apache-2.0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, conversation, find, prompts_of
from specdec.prompts import rows, text_of

FILES = ("mt_bench*.jsonl", "mt-bench*.jsonl", "mt_bench/question.jsonl")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The conversations of a file, or of FastChat's layout, in the data folder."""
    path = find(data_dir, "mt_bench", *FILES)
    return prompts_of(rows(path, malformed.meet), _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    return conversation(row, place, text_of(row, "category", place))
