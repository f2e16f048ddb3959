"""MATH-500: 500 problems of MATH (Hendrycks et al. 2021, arXiv:2103.03874), chosen by Lightman et al. 2023. MIT.

Rows with `problem`, `answer` in LaTeX and `subject`, from a file of JSON lines or Parquet.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Formula, Malformed, Prompt, find, prompts_of
from bench.workloads.sources import rows_of
from specdec.prompts import text_of

NAME = "math500"
FILES = ("math500*.jsonl", "math-500*.jsonl", "MATH-500*.jsonl", "MATH-500/test.jsonl", "math500*.parquet")
BOXED = "\n\nReason step by step, and put the final answer into \\boxed{}."


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The problems of a file in the data folder."""
    return prompts_of(rows_of(find(data_dir, NAME, *FILES), malformed), _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    problem, answer = text_of(row, "problem", place), text_of(row, "answer", place)
    raw = f"Problem: {problem}\nSolution:"
    return Prompt(problem + BOXED, str(row.get("subject", "")), raw=raw, truth=Formula(answer))
