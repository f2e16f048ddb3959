"""XSum (Narayan, Cohen and Lapata 2018, arXiv:1808.08745): news and one-sentence summaries; licence not stated.

Rows with `document` and `summary`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, Summary, find, prompts_of
from bench.workloads.sources import HubSet, hub_rows, rows_of
from specdec.prompts import text_of

HUB = HubSet("EdinburghNLP/xsum", "default", "test", revision="refs/convert/parquet")  # its own branch is a script
FILES = ("xsum*.jsonl", "xsum*.parquet", "data/test-*.parquet", "default/test/*.parquet", "xsum/**/test*/*.parquet")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The articles of the test set: of a file or the hub's layout in the data folder, without one from the hub."""
    rows = rows_of(find(data_dir, "xsum", *FILES), malformed) if data_dir else hub_rows("xsum", HUB, FILES[0])
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    document, summary = text_of(row, "document", place), text_of(row, "summary", place)
    text = f"Summarize this article in one sentence.\n\n{document}"
    return Prompt(text, "summarization", raw=f"{document}\n\nSummary:", truth=Summary(summary))
