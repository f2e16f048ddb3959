"""Parsers of option values.

A parser takes an option's name and its text, and returns its value or raises ValueError with the name, the value, the
rule and the remedy.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bench.engines.base import Urls
from bench.engines.process import SECRET
from bench.records.schema import MAX_PARTS, Gamma
from bench.workloads.base import Lengths
from specdec.models.placement import parse as parse_placement
from specdec.runtime.checks import nearest

T = TypeVar("T")
Word = TypeVar("Word", bound=str)
Parser = Callable[[str, str], T]

VLLM_RESERVED = {  # key of --vllm-options -> what to use instead
    "model": "use --pairs",
    "dtype": "use --dtype",
    "load_format": "use a pair of bench/catalogue/pairs.toml that has one",
    "enable_prefix_caching": "every cell decodes the same prompts, and no other engine caches them between cells",
    "disable_log_stats": "without them vLLM counts nothing",
    "speculative_config.model": "use --pairs",
    "speculative_config.method": "use --methods",
    "speculative_config.num_speculative_tokens": "use --gammas",
}
FLAG_VALUES = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}


# -- combinators ---------------------------------------------------------------------------------------------


def optional(parse: Parser[T]) -> Parser[T | None]:
    """None for an empty text."""
    return lambda name, text: parse(name, text) if text else None


def listed(parse: Parser[T], *, distinct: bool = True) -> Parser[tuple[T, ...]]:
    """Comma-separated values."""

    def parse_all(name: str, text: str) -> tuple[T, ...]:
        values = tuple(parse(name, item.strip()) for item in text.split(","))
        for value in values if distinct else ():
            _require(values.count(value) == 1, f"{name} must be distinct, but {value} is repeated; name each once")
        return values

    return parse_all


def possibly_empty(parse: Parser[tuple[T, ...]]) -> Parser[tuple[T, ...]]:
    """An empty list for an empty text."""
    return lambda name, text: parse(name, text) if text else ()


# -- single values -------------------------------------------------------------------------------------------


def choice(*allowed: Word) -> Parser[Word]:
    """One of a few words."""

    def parse(name: str, text: str) -> Word:
        for value in allowed:
            if value == text:
                return value
        raise ValueError(f"{name}={text!r} must be {' or '.join(allowed)}{nearest(text, allowed)}")

    return parse


def integer(minimum: int, remedy: str, *, below: int | None = None) -> Parser[int]:
    """An integer of at least `minimum`."""

    def parse(name: str, text: str) -> int:
        limit = f" and below {below}" if below else ""
        rule = f"{name}={text} must be an integer of at least {minimum}{limit}; {remedy}"
        try:
            value = int(text)
        except ValueError:
            raise ValueError(rule) from None
        _require(value >= minimum and (below is None or value < below), rule)
        return value

    return parse


def number(holds: Callable[[float], bool], rule: str) -> Parser[float]:
    """A finite number that satisfies a rule."""

    def parse(name: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        _require(math.isfinite(value) and holds(value), f"{name}={text} must be {rule}")
        return value

    return parse


def flag(name: str, text: str) -> bool:
    _require(text.lower() in FLAG_VALUES, f"{name}={text!r} must be true or false; use 1 or 0")
    return FLAG_VALUES[text.lower()]


def path(name: str, text: str) -> Path:
    return Path(text)


def folder(name: str, text: str) -> Path:
    """An existing folder."""
    found = Path(text).expanduser()
    _require(found.is_dir(), f"{name}={text!r} must be an existing folder; check the path")
    return found


def executable(name: str, text: str) -> Path:
    """A program on PATH or by its own path, made absolute but not resolved: a virtual environment's is a link."""
    found = shutil.which(os.path.expanduser(text))
    if found is None:
        raise ValueError(f"{name}={text!r} must be a program that can be run; name a virtual environment's python")
    return Path(os.path.abspath(found))


# -- values of this harness ----------------------------------------------------------------------------------


def device(name: str, text: str) -> str:
    kind, _, index = text.partition(":")
    _require(
        text in ("auto", "cpu") or (kind == "cuda" and (index.isdigit() or text == "cuda")),
        f"{name}={text!r} must be auto, cpu, cuda or cuda:N; check the spelling",
    )
    return text


def gamma(name: str, text: str) -> Gamma:
    remedy = "for plain decoding use --methods autoregressive, for an adaptive number auto"
    return "auto" if text == "auto" else integer(1, remedy)(name, text)


def placement(name: str, text: str) -> str:
    parse_placement(text)
    return text


def falling_rates(name: str, text: str) -> tuple[float, ...]:
    """Probabilities, none larger than the one before."""
    rates = listed(number(lambda value: 0 <= value <= 1, "a list of probabilities"), distinct=False)(name, text)
    _require(
        list(rates) == sorted(rates, reverse=True),
        f"{name}={text} must not rise: the i-th is the share of all steps that accept position i",
    )
    return rates


def shard(name: str, text: str) -> str:
    index, _, count = text.partition("/")
    are_numbers = all(part.isdecimal() and len(part) <= len(str(MAX_PARTS)) for part in (index, count))
    _require(
        are_numbers and 1 <= int(index) <= int(count) <= MAX_PARTS,
        f"{name}={text!r} must be I/N with 1 <= I <= N <= {MAX_PARTS}; for example 1/3, and 2/3, 3/3 elsewhere",
    )
    return f"{int(index)}/{int(count)}"


def lengths(name: str, text: str) -> Lengths:
    """MIN:MAX, both included."""
    least, _, most = text.partition(":")
    holds = least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)
    _require(holds, f"{name}={text!r} must be MIN:MAX with 1 <= MIN <= MAX; for example 128:512")
    return int(least), int(most)


def shares(name: str, text: str) -> tuple[float, float]:
    """START:END, shares of a whole."""
    start, _, end = text.partition(":")
    rule = f"{name}={text!r} must be START:END with 0 <= START < END <= 1; for example 0.2:0.9"
    try:
        found = float(start), float(end)
    except ValueError:
        raise ValueError(rule) from None
    _require(0 <= found[0] < found[1] <= 1, rule)
    return found


def template_arguments(name: str, text: str) -> str:
    """Variables of a chat template as canonical JSON."""
    arguments = _json_object(text)
    if arguments is None:
        raise ValueError(f'{name} must be a JSON object; try \'{{"reasoning_effort": "high"}}\'')
    return json.dumps(arguments, sort_keys=True)


def vllm_options(name: str, text: str) -> str:
    """vLLM's engine arguments as canonical JSON, without secrets and without what other options set."""
    options = _json_object(text)
    nested = options.get("speculative_config", {}) if options is not None else None
    if options is None or not isinstance(nested, dict):
        raise ValueError(
            f"{name} must be a JSON object, as is its speculative_config; try '{{\"enforce_eager\": true}}'"
        )
    for key, value in {**options, **{f"speculative_config.{key}": "" for key in nested}}.items():
        _require(
            not SECRET.search(key) or not isinstance(value, str),
            f"{name}={key} must be left out, as options are printed and kept; set a variable such as HF_TOKEN",
        )
        _require(key not in VLLM_RESERVED, f"{name}={key} must be left to the harness; {VLLM_RESERVED.get(key, '')}")
    return json.dumps(options, sort_keys=True)


def words(name: str, text: str) -> str:
    """Words of a command line, quoted as in a shell."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{name}={text!r} must be words as in a shell ({error}); close the quotation") from None
    return text


def _json_object(text: str) -> dict[str, Any] | None:
    """None if a text is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def server_url(name: str, text: str) -> str | None:
    """A server's address, without credentials, as it is printed and kept. None if there is none."""
    text = text.strip()
    _require(
        not text or _is_plain_address(text),
        f"{name} must be http://HOST:PORT or https://HOST:PORT, without a user, a password or a query; an API key goes "
        "into SPECDEC_SERVER_API_KEY",
    )
    return text or None


def server_urls(engines: Sequence[str]) -> Parser[Urls]:
    """An address for all of these engines, or ENGINE=URL, ...; possibly none."""

    def parse(name: str, text: str) -> Urls:
        items = [item.strip() for item in text.split(",") if item.strip()]
        found = [_server_of(name, item, engines) for item in items]
        _require(
            len(dict(found)) == len(found),
            f"{name} must have one address for each engine; with several, name the engine of each: ENGINE=URL",
        )
        return Urls(tuple(found))

    return parse


def _server_of(name: str, text: str, engines: Sequence[str]) -> tuple[str, str]:
    engine, separator, address = text.partition("=")
    if not separator or "://" in engine:
        engine, address = "", text
    _require(
        engine in ("", *engines),
        f"{name}={engine}=... must name one of {', '.join(engines)}{nearest(engine, engines)}",
    )
    return engine, server_url(name, address) or ""


def word(name: str, text: str) -> str:
    """A name of another program's, such as fp8."""
    _require(
        re.fullmatch(r"[\w.+-]+", text, re.ASCII) is not None,
        f"{name}={text!r} must be one word of letters, digits and ._+-; use the server's own name",
    )
    return text


def _is_plain_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    is_plain = parts.netloc.lower() in {f"{host}:{port}", host, f"{host}:"}
    has_query = parts.query or parts.fragment or "?" in text or "#" in text
    return parts.scheme in ("http", "https") and bool(host) and is_plain and not has_query


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
