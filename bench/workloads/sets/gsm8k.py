"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168): grade school mathematics, rows with `question` and `answer`. MIT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Number, Prompt, find, prompts_of
from bench.workloads.scoring.extraction import is_number
from bench.workloads.sources import HubSet, hub_rows, rows_of
from specdec.prompts import text_of

HUB = HubSet("openai/gsm8k", "main", "test")
FILES = ("gsm8k*.jsonl", "gsm8k*.parquet", "main/test-*.parquet", "gsm8k/main/test-*.parquet")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The questions of the test set: of a file or the hub's layout in the data folder, without one from the hub."""
    rows = rows_of(find(data_dir, "gsm8k", *FILES), malformed) if data_dir else hub_rows("gsm8k", HUB, FILES[0])
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    question, answer = text_of(row, "question", place), text_of(row, "answer", place)
    _, marker, number = answer.rpartition("####")
    if not marker or not is_number(number):
        raise ValueError(f"{place}: answer={answer[-40:]!r} must end in #### and a number; correct or remove the row")
    return Prompt(question, "mathematics", raw=f"Question: {question}\nAnswer:", truth=Number(number.strip()))
