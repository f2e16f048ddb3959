"""Spec-Bench (Xia et al. 2024, arXiv:2401.07851): 480 questions of six kinds, rows with `category` and `turns`.

The kinds of MT-bench (writing, roleplay, ...) are one category, as in Spec-Bench's own tables; only they have a second
turn, which is asked with --turns all. Translations and summaries are scored by their reference. Apache-2.0.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, Summary, conversation, find, prompts_of
from specdec.prompts import rows, text_of

MULTI_TURN = "multi_turn"
OWN = ("translation", "summarization", "qa", "math_reasoning", "rag")
SCORED = ("translation", "summarization")  # the references of others are answers that ROUGE says little about


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The conversations of the file spec-bench*.jsonl, or as its repository has it, in the data folder."""
    path = find(data_dir, "spec_bench", "spec-bench*.jsonl", "spec_bench*.jsonl", "spec_bench/question.jsonl")
    return prompts_of(rows(path, malformed.meet), _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    prompt, category = conversation(row, place, _category(row, place)), row["category"]
    if category not in SCORED or "reference" not in row:
        return prompt
    match row["reference"]:
        case [str(text)] if text:
            return replace(prompt, truth=Summary(text))
    raise ValueError(f"{place}: reference={row['reference']!r} must be a list of one text; correct or remove the row")


def _category(row: dict[str, Any], place: str) -> str:
    kind = text_of(row, "category", place)
    return kind if kind in OWN else MULTI_TURN
