"""Rows of files and token ids of questions."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from specdec.prompts import array_rows, encode, encode_bytes, rows, text_of


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_rows_come_with_their_places_and_empty_lines_are_none(name: str, tmp_path: Path) -> None:
    content = b'{"a": "x"}\n\n{"a": "\xe2\x80\xa8"}\n'
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    assert list(rows(path)) == [(f"{path}:1", {"a": "x"}), (f"{path}:3", {"a": "\u2028"})]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.jsonl", b"\xff\n"), ("p.jsonl.gz", b"not gzip"), ("p.jsonl.gz", gzip.compress(b'{"a": "x"}\n', mtime=0)[:-9])],
)
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"p\.jsonl.*: must be a complete UTF-8 text file .*; download it again"):
        list(rows(tmp_path / name))


def test_a_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(rows(tmp_path / "p.jsonl"))


def test_a_text_must_have_something_in_it() -> None:
    assert text_of({"prompt": "x"}, "prompt", "f:1") == "x"
    with pytest.raises(ValueError, match="f:1: prompt=7 must be a non-empty string"):
        text_of({"prompt": 7}, "prompt", "f:1")


def test_without_a_tokenizer_text_is_refused_and_the_message_offers_bytes() -> None:
    with pytest.raises(ValueError, match="a text prompt needs a model with a tokenizer; load one"):
        encode("aé", None)
    assert encode_bytes("aé") == (97, 195, 169)


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000], ids=["deep", "many digits"])
def test_json_that_python_cannot_read_is_a_malformed_row(value: str, tmp_path: Path) -> None:
    lines, array = tmp_path / "p.jsonl", tmp_path / "p.json"
    lines.write_text(f'{{"a": {value}}}\n{{"a": "x"}}\n')
    array.write_text(f'[{{"a": {value}}}]')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: must be one JSON object per line .*; correct or remove the row"):
        list(rows(lines))
    malformed: list[ValueError] = []
    assert list(rows(lines, malformed.append)) == [(f"{lines}:2", {"a": "x"})]
    assert len(malformed) == 1
    with pytest.raises(ValueError, match=r"p\.json:record 1: must be complete"):
        list(array_rows(array))
