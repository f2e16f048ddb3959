"""Prompts as they come: rows of JSON files, and questions as token ids and back."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OnMalformed = Callable[[ValueError], None]  # what is done about a malformed row: raise, or go on with the next


def refuse(error: ValueError) -> None:
    """Let no malformed row pass."""
    raise error


def rows(path: Path, on_malformed: OnMalformed = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file of JSON lines, which may be gzipped, each with its place `file:line` for messages.

    Raises ValueError for a broken row, unless `on_malformed` lets it pass, and for a broken file, FileNotFoundError.
    """
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = _row(f"{path}:{number}", line)
            except ValueError as error:
                on_malformed(error)
            else:
                yield f"{path}:{number}", row


def array_rows(path: Path, on_malformed: OnMalformed = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that is one JSON array, each with its place `file:record N`.

    One after the other, as such a file may be cut off inside its last record: that one is malformed, what comes before
    it is not. Raises ValueError for it, unless `on_malformed` lets it pass, and for a broken file.
    """
    text, decoder = "".join(_lines(path)), json.JSONDecoder()
    position, number = text.find("{"), 1
    while position >= 0:
        try:
            row, end = decoder.raw_decode(text, position)
        except ValueError as error:
            message = f"must be whole, but the file is damaged or cut off there ({error}); get it again"
            on_malformed(ValueError(f"{path}:record {number}: {message}"))
            return
        yield f"{path}:record {number}", row
        position, number = text.find("{", end), number + 1


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """A row's field. Raises ValueError naming the place unless it is a text with something in it."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {field}={value!r} must be a text that is not empty; correct or remove the row")
    return value


def encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a question: through the chat template if the tokenizer has one; its bytes without a tokenizer."""
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        return tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    return encode_raw(text, tokenizer)


def encode_raw(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a text as it stands, to be gone on with; its bytes without a tokenizer."""
    return tuple(text.encode()) if tokenizer is None else tuple(tokenizer(text).input_ids)


def decode(tokens: Sequence[int], tokenizer: Any) -> str | None:
    """The question whose token ids these are, or None if there is none that is encoded so."""
    if tokenizer is None:
        return bytes(tokens).decode()
    one, other = encode("a", tokenizer), encode("b", tokenizer)
    start = next(i for i, (ours, theirs) in enumerate(zip(one, other, strict=True)) if ours != theirs)
    text: str = tokenizer.decode(tokens[start : len(tokens) - (len(one) - start - 1)])
    return text if encode(text, tokenizer) == tuple(tokens) else None


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as lines:
            yield from lines
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a whole file of UTF-8 text ({error}); get it again") from None


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: must be one JSON object a line ({error}); correct or remove the row") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {line.strip()[:40]!r} must be a JSON object; correct or remove the row")
    return row
