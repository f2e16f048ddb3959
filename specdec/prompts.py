"""Prompts as they come: rows of JSON files, and questions as token ids and back."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
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
    return whole(value, f"{place}: {field}")


def whole(text: str, name: str) -> str:
    """The text. Raises ValueError if it has half of a surrogate pair, as escapes of JSON and odd terminals may."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{name}={text[:40]!r} must have no half of a surrogate pair, which no tokenizer takes; remove it"
        )
    return text


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, which end at a line feed alone (U+2028, form feeds and the like are text), without it.

    Raises ValueError unless it is UTF-8, FileNotFoundError.
    """
    yield from (line.removesuffix("\n").removesuffix("\r") for line in _lines(path))


def encode(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a question: through the chat template if the tokenizer has one. Raises ValueError without one."""
    if getattr(tokenizer, "chat_template", None):
        return render([{"role": "user", "content": text}], tokenizer)
    return encode_raw(text, tokenizer)


def encode_raw(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a text as it stands, to be continued.

    Raises ValueError without a tokenizer. Where the text begins with the token that the tokenizer puts first, as a chat
    template rendered before does, so that it is there twice, that is logged.
    """
    if tokenizer is None:
        raise ValueError("a text prompt needs a model with a tokenizer; load one with it, or give token ids")
    tokens = tuple(tokenizer(text).input_ids)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and tokens[:2] == (bos, bos):
        logging.getLogger("specdec").warning(
            "a prompt begins with %s twice: the text has it, as rendered chat templates do, and the tokenizer adds it; "
            "give the messages instead, or the token ids",
            tokenizer.bos_token,
        )
    return tokens


def encode_bytes(text: str) -> tuple[int, ...]:
    """A text's bytes as token ids, for models of random weights without a tokenizer: what they read means nothing."""
    return tuple(text.encode())


def encode_to_time(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a question where only times are taken, which do not depend on what is read: else its bytes."""
    return encode_bytes(text) if tokenizer is None else encode(text, tokenizer)


def decode(tokens: Sequence[int], tokenizer: Any) -> str | None:
    """The question whose token ids these are, or None if there is none that is encoded so."""
    one, other = encode("a", tokenizer), encode("b", tokenizer)
    start = next(i for i, (ours, theirs) in enumerate(zip(one, other, strict=True)) if ours != theirs)
    text: str = tokenizer.decode(tokens[start : len(tokens) - (len(one) - start - 1)])
    return text if encode(text, tokenizer) == tuple(tokens) else None


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:  # a byte order mark is no text
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


# ---- prompts as they are given to an engine

Message = Mapping[str, Any]  # of a chat: {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message]


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts, which may be given alone: a text, token ids, or the messages of a chat.

    Arrays and tensors are taken as lists. Raises ValueError naming what is given where it is none of these.
    """
    prompts = _as_list(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list):
        raise ValueError(f"prompts={_shown(prompts)} must be {_FORMS}, or a list of them")
    found = [_as_list(prompt) for prompt in prompts]
    is_one = found and (all(_is_number(each) for each in found) or all(isinstance(each, Mapping) for each in found))
    return [found] if is_one else found


def as_messages(prompt: Any) -> list[Message] | None:
    """The messages that a prompt is, or None if it is none. Raises ValueError where a message lacks its role."""
    if not isinstance(prompt, list) or not prompt or not all(isinstance(each, Mapping) for each in prompt):
        return None
    for each in prompt:
        if not isinstance(each.get("role"), str) or "content" not in each:
            raise ValueError(f'message={_shown(each)} must be such as {{"role": "user", "content": "Hi"}}')
    return prompt


def as_token_ids(prompt: Any, index: int) -> tuple[int, ...]:
    """The token ids that prompt number `index` is. Raises ValueError where it is none, naming the first bad one."""
    if not isinstance(prompt, list):
        raise ValueError(f"prompt {index} is {_shown(prompt)} and must be {_FORMS}")
    ids = [_as_list(token) for token in prompt]
    for wrong in (token for token in ids if not _is_number(token) or not isinstance(token, Integral)):
        raise ValueError(
            f"prompt {index} has {_shown(wrong)} among its token ids, which must be integers; or give a text"
        )
    return tuple(map(int, ids))


def render(messages: Sequence[Message], tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a chat, by the tokenizer's template, up to where the answer begins.

    Raises ValueError without a template, and where the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a model whose tokenizer has a chat template; give the text as it is to be read")
    from jinja2 import TemplateError

    try:
        return tuple(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"messages={_shown(list(messages))} must be such as the chat template takes: {error}"
        ) from None


_FORMS = 'a text, a list of token ids, or a list of messages such as {"role": "user", "content": "Hi"}'


def _as_list(value: Any) -> Any:
    """A list or number of what is a tuple, array, tensor or generator; everything else as it is."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        return value
    return list(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:60] + '...'} ({type(value).__name__})"
