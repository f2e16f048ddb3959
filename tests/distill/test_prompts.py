"""Prompts as they come, and apart from evaluation sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.distill import prompts
from specdec.distill.prompts import Dialogue, EvaluationText


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Why?", "reply": "Because."}, {"prompt": "How?"})
    assert prompts.read_dialogues(str(path)) == [Dialogue("Why?", "Because."), Dialogue("How?")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken\n", r"p\.jsonl:2: must be one JSON object per line"),
        ("[1]\n", r"p\.jsonl:2: '\[1\]' must be a JSON object"),
        ({"reply": "x"}, r"p\.jsonl:2: prompt=None must be a non-empty string"),
        ({"prompt": " "}, r"p\.jsonl:2: prompt=' ' must be a non-empty string"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "Why?"}, row)
    with pytest.raises(ValueError, match=message):
        prompts.read_dialogues(str(path))


def test_sharegpt_is_read_up_to_the_record_that_is_cut_off(tmp_path: Path) -> None:
    """Only conversations that begin with a question and its answer count."""
    turns = [{"from": "human", "value": "Hi {you}"}, {"from": "gpt", "value": "Hello"}, {"from": "human", "value": "?"}]
    records = [
        {"id": "a", "conversations": turns},
        {"id": "b", "conversations": turns[1:]},
        {"id": "c", "conversations": []},
        {"id": "d", "conversations": [{"from": "human", "value": " "}, turns[1]]},
        {"id": "e", "conversations": turns[:2]},
        {"id": "f", "conversations": turns},
    ]
    source = tmp_path / "sharegpt.json"
    source.write_text(json.dumps(records, indent=1)[:-60])
    prompts._convert(source, tmp_path / "made")
    assert prompts.read_dialogues(str(tmp_path / "made" / "dialogues.jsonl")) == [Dialogue("Hi {you}", "Hello")] * 2


def test_ten_words_in_a_row_are_an_overlap(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
    path = write(tmp_path / "e.jsonl", {"question": " ".join(words), "turns": ["short text", ""]})
    evaluation = EvaluationText([path])
    assert evaluation.overlaps(Dialogue("Well: ONE, two three four five six seven eight nine ten!"))
    assert evaluation.overlaps(Dialogue("x", "so " + " ".join(words[1:])))
    assert not evaluation.overlaps(Dialogue(" ".join(words[:9]), ""))
    assert not evaluation.overlaps(Dialogue(" ".join(words[::-1])))
    assert evaluation.overlaps(Dialogue("Short text."))
