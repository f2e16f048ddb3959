"""CNN/Daily Mail (See, Liu and Manning 2017, arXiv:1704.04368): news and their highlights; Apache-2.0.

Rows with `article` and `highlights`, asked for as T5 was trained to be asked. Leviathan et al. 2023 call it CNNDM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, Summary, find, prompts_of
from bench.workloads.sources import HubSet, hub_rows, rows_of
from specdec.prompts import text_of

NAME = "cnn_dailymail"
HUB = HubSet("abisee/cnn_dailymail", "3.0.0", "test")
FILES = ("cnn_dailymail*.jsonl", "cnn_dailymail*.parquet", "3.0.0/test-*.parquet", "cnn_dailymail/**/test*.parquet")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The articles of the test set: of a file or the hub's layout in the data folder, without one from the hub."""
    rows = rows_of(find(data_dir, NAME, *FILES), malformed) if data_dir else hub_rows(NAME, HUB, FILES[0])
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    article, highlights = text_of(row, "article", place), text_of(row, "highlights", place)
    return Prompt(f"summarize: {article}", "summarization", truth=Summary(highlights))
