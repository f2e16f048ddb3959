"""Prompts: reading them from JSON files, and encoding them as token ids."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

OnMalformed = Callable[[ValueError], None]  # called for a malformed row: raises, or returns to skip it


def refuse(error: ValueError) -> None:
    """Raise: malformed rows are errors."""
    raise error


def rows(path: Path, on_malformed: OnMalformed = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a JSON lines file, possibly gzipped, each with its location `file:line` for messages.

    Raises ValueError for a malformed row, unless `on_malformed` skips it, and for an unreadable file; and
    FileNotFoundError.
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
    """The objects of a JSON array file, each with its location `file:record N`.

    They are parsed one at a time, so a file truncated inside its last record still yields the ones before. Raises
    ValueError for that record, unless `on_malformed` skips it, and for an unreadable file.
    """
    text, decoder = "".join(_lines(path)), json.JSONDecoder()
    position, number = text.find("{"), 1
    while position >= 0:
        try:
            row, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            message = f"must be complete, but the file is damaged or truncated there ({error}); download it again"
            on_malformed(ValueError(f"{path}:record {number}: {message}"))
            return
        yield f"{path}:record {number}", row
        position, number = text.find("{", end), number + 1


def text_of(row: dict[str, Any], field: str, place: str) -> str:
    """A text field of a row. Raises ValueError naming the location unless it is a non-empty string."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{place}: {field}={value!r} must be a non-empty string; correct or remove the row")
    return whole(value, f"{place}: {field}")


def whole(text: str, name: str) -> str:
    """The text. Raises ValueError if it has an unpaired surrogate, which JSON escapes and odd terminals can produce."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(
            f"{name}={text[:40]!r} must not contain an unpaired surrogate, which tokenizers reject; remove it"
        )
    return text


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends. Only a line feed ends a line, not U+2028, form feeds and the like.

    Raises ValueError unless the file is UTF-8, and FileNotFoundError.
    """
    yield from (line.removesuffix("\n").removesuffix("\r") for line in _lines(path))


def encode(text: str, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Token ids of a question, through the chat template if there is one. Raises ValueError without a tokenizer.

    arguments: variables of the chat template.
    """
    if getattr(tokenizer, "chat_template", None):
        return render([{"role": "user", "content": text}], tokenizer, arguments)
    return encode_raw(text, tokenizer)


def encode_raw(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a text to be continued as it is, without the chat template.

    Raises ValueError without a tokenizer, and for a text with an unpaired surrogate. Logs a warning if the result
    begins with two BOS tokens, as it does for a text to which a chat template has already been applied.
    """
    if tokenizer is None:
        raise ValueError("a text prompt needs a model with a tokenizer; load one with a tokenizer, or pass token ids")
    tokens = tuple(tokenizer(whole(text, "prompt")).input_ids)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None and tokens[:2] == (bos, bos):
        logging.getLogger("specdec").warning(
            "prompt begins with %s twice: once in the text, as in a rendered chat template, and once from the "
            "tokenizer; pass the messages or token ids instead",
            tokenizer.bos_token,
        )
    return tokens


def encode_bytes(text: str) -> tuple[int, ...]:
    """The bytes of a text as token ids, for models with random weights and no tokenizer."""
    return tuple(text.encode())


def encode_to_time(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Token ids of a question for timing only, where content does not matter: its bytes if there is no tokenizer."""
    return encode_bytes(text) if tokenizer is None else encode(text, tokenizer)


def decode(tokens: Sequence[int], tokenizer: Any) -> str | None:
    """The question that `encode` turns into these token ids, or None if there is none."""
    one, other = encode("a", tokenizer), encode("b", tokenizer)
    start = next(i for i, (left, right) in enumerate(zip(one, other, strict=True)) if left != right)
    text: str = tokenizer.decode(tokens[start : len(tokens) - (len(one) - start - 1)])
    return text if encode(text, tokenizer) == tuple(tokens) else None


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:  # skips a byte order mark
            yield from lines
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be a complete UTF-8 text file ({error}); download it again") from None


def _row(place: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # of JSON, of an integer of too many digits, of deep nesting
        raise ValueError(f"{place}: must be one JSON object per line ({error}); correct or remove the row") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {line.strip()[:40]!r} must be a JSON object; correct or remove the row")
    return row


# ---- prompts passed to an engine

Message = Mapping[str, Any]  # of a chat: {"role": "user", "content": "..."}
Prompt = str | Sequence[int] | Sequence[Message]


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts from one prompt or several: texts, token ids or chat messages.

    Arrays and tensors are converted to lists. Raises ValueError showing the value if it is none of these.
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
    """The prompt if it is a list of chat messages, else None. Raises ValueError if a message lacks a field."""
    if not isinstance(prompt, list) or not prompt or not all(isinstance(each, Mapping) for each in prompt):
        return None
    for each in prompt:
        if not isinstance(each.get("role"), str) or "content" not in each:
            raise ValueError(f'message={_shown(each)} must have the form {{"role": "user", "content": "Hi"}}')
    return prompt


def as_token_ids(prompt: Any, index: int) -> tuple[int, ...]:
    """The token ids of prompt number `index`. Raises ValueError naming the first element that is not a token id."""
    if not isinstance(prompt, list):
        raise ValueError(f"prompt {index} is {_shown(prompt)} and must be {_FORMS}")
    ids = [_as_list(token) for token in prompt]
    for wrong in (token for token in ids if not _is_number(token) or not isinstance(token, Integral)):
        raise ValueError(
            f"prompt {index} has {_shown(wrong)} among its token ids, which must be integers; or pass a string"
        )
    return tuple(map(int, ids))


def render(messages: Sequence[Message], tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Token ids of a chat by the tokenizer's chat template, including the generation prompt.

    arguments: variables of the template, such as {"enable_thinking": False}; templates ignore those they do not know.
    Raises ValueError without a template, and if the template rejects the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages need a model whose tokenizer has a chat template; pass the rendered text instead")
    from jinja2 import TemplateError

    try:
        own = {"add_generation_prompt": True, "return_dict": False}
        return tuple(tokenizer.apply_chat_template(list(messages), **{**(arguments or {}), **own}))
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"messages={_shown(list(messages))} must be valid for the model's chat template: {error}"
        ) from None


_FORMS = 'a string, a list of token ids, or a list of messages such as {"role": "user", "content": "Hi"}'


def _as_list(value: Any) -> Any:
    """Convert tuples, arrays, tensors and generators to lists or numbers; return everything else unchanged."""
    if hasattr(value, "tolist") and not isinstance(value, memoryview):
        return value.tolist()
    if isinstance(value, _NOT_LISTS) or not isinstance(value, Iterable):
        return value
    return list(value)


_NOT_LISTS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 60 else shown[:60] + '...'} ({type(value).__name__})"
