"""Parses and validates the replies of servers. They are untrusted: every invalid reply raises an EngineError.

Servers and proxies may send anything: token ids beyond the vocabulary, counters that are not numbers, answers without
an end. The caller must fail instead of recording a wrong result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specdec.runtime.printable import printable
from specdec.servers.errors import EngineError

MAX_COUNT = 1 << 53  # of any counter; larger floating-point numbers of a metrics page are not exact
MAX_OF_VERSION = 100  # characters
MAX_SHOWN = 2000  # characters of a server's error message


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object. name: for error messages."""
    try:
        return dict(mapping(json.loads(text), name))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{name} must be JSON, but the server sent {shown(text)} ({type(error).__name__})") from None


def parse_models(text: str) -> list[dict[str, str]]:
    """`id`, `root` and `owned_by` of a server's models; what it leaves out is "" or, for `root`, the id."""
    models = items(parse_object(text, "/v1/models"), "data")
    return [_model(mapping(model, "/v1/models")) for model in models or [None]]


def _model(model: Mapping[str, Any]) -> dict[str, str]:
    name, root, owner = (model.get(key) for key in ("id", "root", "owned_by"))
    if not isinstance(name, str) or not isinstance(root, str | None):
        raise EngineError(
            f"the id of a served model must be a string, but is {shown(name)}; is this an OpenAI-compatible server?"
        )
    return {"id": printable(name), "root": printable(root or name), "owned_by": printable(str(owner or ""))}


def parse_model(text: str) -> dict[str, str]:
    """The first model of a server, as `parse_models` reads it."""
    return parse_models(text)[0]


def parse_version(text: str, name: str = "version") -> str:
    """The version of a server, from a page that has it under this name."""
    version = parse_object(text, name).get(name)
    if not isinstance(version, str):
        raise EngineError(f"{name}={shown(version)} must be a string; is this an OpenAI-compatible server?")
    return printable(version[:MAX_OF_VERSION])


def integer(value: Any, name: str, bound: int = MAX_COUNT) -> int:
    """An integer from 0 and below `bound`, checked."""
    if type(value) is not int or not 0 <= value < bound:
        raise EngineError(f"{name}={shown(value)} must be integers from 0 and below {bound}; see the server's log")
    return value


def items(holder: Mapping[str, Any], name: str, default: Any = None) -> list[Any]:
    """The list of an object that has this name, checked."""
    value = holder.get(name, default)
    if not isinstance(value, list | tuple):
        raise EngineError(f"{name}={shown(value)} must be a list; is this an OpenAI-compatible server?")
    return list(value)


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """A JSON object, checked. name: for error messages."""
    if not isinstance(value, Mapping):
        raise EngineError(f"{name}={shown(value)} must be an object; is this an OpenAI-compatible server?")
    return value


def shown(value: Any) -> str:
    """The repr of a value, truncated for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
