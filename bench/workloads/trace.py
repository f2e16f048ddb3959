"""Traces of requests: when each arrived, how long its prompt was, and how long its answer.

JSON lines with `input_length` and `output_length` in tokens and either `timestamp` in milliseconds, as in Mooncake's
traces (Qin et al. 2024, arXiv:2407.00079; FAST25-release/traces in kvcache-ai/Mooncake), or `arrival_s` in seconds.
`hash_ids` name blocks of 512 tokens: equal ids are equal blocks, so requests share prefixes as they did. A trace has no
texts: its prompts are random tokens.
"""

from __future__ import annotations

import math
from typing import Any

from bench.workloads.base import Drawn, Prompt

BLOCK = 512  # tokens that a hash id stands for
MS_PER_S = 1000


def is_request(row: dict[str, Any]) -> bool:
    """Whether a row of a file is of a trace."""
    return "input_length" in row and "prompt" not in row


def prompt_of(row: dict[str, Any], place: str, number: int) -> Prompt:
    """The prompt of a row. number: its own, from 0. Raises ValueError naming the place for a malformed row."""
    num_tokens, max_tokens = (_length(row, name, place) for name in ("input_length", "output_length"))
    arrival_s = _arrival_s(row, place)
    blocks = _blocks(row, num_tokens, place)
    text = f"request {number} at {arrival_s:g} s: {num_tokens} tokens, blocks {blocks}, {max_tokens} in return"
    return Prompt(text, drawn=Drawn(number, num_tokens, blocks=blocks), arrival_s=arrival_s, max_tokens=max_tokens)


def _length(row: dict[str, Any], name: str, place: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 1:
        raise ValueError(f"{place}: {name}={value!r} must be an integer of at least 1; correct or remove the row")
    return value


def _arrival_s(row: dict[str, Any], place: str) -> float:
    name, scale = ("arrival_s", 1) if "arrival_s" in row else ("timestamp", MS_PER_S)
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{place}: {name}={value!r} must be a number >= 0; correct or remove the row")
    return value / scale


def _blocks(row: dict[str, Any], num_tokens: int, place: str) -> tuple[int, ...]:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise ValueError(f"{place}: hash_ids={ids!r:.40} must be a list of integers; correct or remove the row")
    if ids and len(ids) != math.ceil(num_tokens / BLOCK):
        raise ValueError(
            f"{place}: hash_ids must be one for each {BLOCK} of the {num_tokens} tokens, but are {len(ids)}; correct "
            "or remove the row"
        )
    return tuple(ids)
