"""WMT 2014 English to German (Bojar et al. 2014): news, asked for as T5 was trained to be asked; not scored.

Rows with `translation`, which has `en` and `de`. What Leviathan et al. 2023 call EnDe is the translation between these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, find, prompts_of
from bench.workloads.sources import HubSet, hub_rows, rows_of
from specdec.prompts import text_of

HUB = HubSet("wmt/wmt14", "de-en", "test")
FILES = ("wmt14*.jsonl", "wmt14*.parquet", "de-en/test-*.parquet", "wmt14/**/test*.parquet")


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The sentences of the test set: of a file or the hub's layout in the data folder, without one from the hub."""
    rows = rows_of(find(data_dir, "wmt14", *FILES), malformed) if data_dir else hub_rows("wmt14", HUB, FILES[0])
    return prompts_of(rows, _prompt, malformed)


def _prompt(row: dict[str, Any], place: str) -> Prompt:
    pair = row.get("translation")
    if not isinstance(pair, dict):
        raise ValueError(f"{place}: translation={pair!r} must be an object with `en`; correct or remove the row")
    return Prompt(f"translate English to German: {text_of(pair, 'en', place)}", "translation")
