"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade school mathematics, rows with `question` and `answer`. MIT."""

from __future__ import annotations

from pathlib import Path

from bench.workloads import Prompt, find
from specdec.prompts import rows, text_of


def read(data_dir: Path | None) -> list[Prompt]:
    """The questions of the file gsm8k*.jsonl in the data folder."""
    path = find(data_dir, "gsm8k", "gsm8k*.jsonl")
    return [Prompt(text_of(row, "question", place), "mathematics") for place, row in rows(path)]
