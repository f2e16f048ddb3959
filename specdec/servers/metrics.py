"""Counters of a server's metrics page, in the Prometheus format or as TensorRT-LLM's list of iterations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from specdec.servers.errors import EngineError
from specdec.servers.replies import MAX_COUNT, integer, mapping, shown

SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
POSITION = re.compile(r'position="(\d{1,6})"')
PREFIX = "vllm:spec_decode_num_"
COUNTERS = {"num_drafts": "drafts", "num_drafted": "draft_tokens", "num_accepted": "accepted_tokens"}


def parse_counters(page: str) -> dict[str, Any]:
    """Counters of a Prometheus page, summed over engines: `num_finished`, and those of drafts if the server drafts."""
    sums: dict[str, int] = {}
    for name, _, value in samples(page):
        if name.startswith((PREFIX, "vllm:request_success")) and name.endswith("_total"):
            sums[name] = sums.get(name, 0) + count(value, name)
    finished = {"num_finished": sums.get("vllm:request_success_total", 0)}
    if f"{PREFIX}drafts_total" not in sums:
        return finished
    needed = {name: f"{PREFIX}{key}_total" for name, key in COUNTERS.items()}
    if missing := [key for key in needed.values() if key not in sums]:
        raise EngineError(f"the server must report {missing[0]} with {PREFIX}drafts_total; use another version")
    return finished | {name: sums[key] for name, key in needed.items()} | {"accepted_at": accepted_at(page)}


def accepted_at(page: str, prefix: str = PREFIX) -> list[int]:
    """Accepted tokens per position of drafts, summed over engines; empty without any. prefix: of their names.

    Raises EngineError unless the positions are 0, 1, ...
    """
    sums: dict[int, int] = {}
    for name, labels, value in samples(page):
        if name == f"{prefix}accepted_tokens_per_pos_total" and (position := POSITION.search(labels)):
            index = int(position[1])
            sums[index] = sums.get(index, 0) + count(value, name)
    if sorted(sums) != list(range(len(sums))):
        raise EngineError(f"positions of accepted tokens must be 0, 1, ..., but are {shown(sorted(sums))}")
    return [sums[index] for index in sorted(sums)]


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The increase of counters. Raises EngineError if the counters differ or one has decreased."""
    olds, news = (counters.get("accepted_at", []) for counters in (before, after))
    grown = {name: after[name] - before.get(name, 0) for name in after if name != "accepted_at"}
    accepted_at = [new - old for new, old in zip(news, olds, strict=False)]
    if len(olds) != len(news) or any(increase < 0 for increase in (*grown.values(), *accepted_at)):
        raise EngineError("the server's counters must only increase, but changed otherwise; was it restarted?")
    return grown | {"accepted_at": accepted_at}


def samples(page: str) -> Iterator[tuple[str, str, str]]:
    """(name, labels, value) of each sample line."""
    for line in page.splitlines():
        if sample := SAMPLE.match(line):
            yield sample["name"], sample["labels"] or "", sample["value"]


def amount(text: str, name: str) -> float:
    """The value of a sample, checked: a number from 0 to 2**53."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < MAX_COUNT:  # nor NaN
        raise EngineError(f"{name}={shown(text)} must be a number from 0 to 2**53; is this a vLLM server's page?")
    return value


def count(text: str, name: str) -> int:
    """The value of a counter, checked."""
    return int(amount(text, name))


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Cumulative counters of a server. num_finished: requests; None if not reported."""

    num_finished: int | None
    num_drafted: int
    num_accepted: int


def draft_counts(page: str) -> DraftCounts | None:
    """The draft counters of any server's metrics page, summed over engines; None if it has none.

    vLLM and llama.cpp name them alike, with different prefixes.
    """
    sums: dict[str, int] = {}
    for name, _, value in samples(page):
        _, _, own = name.rpartition(":")
        if own in ("request_success_total", *(f"spec_decode_num_{each}_total" for each in COUNTERS.values())):
            sums[own] = sums.get(own, 0) + count(value, name)
    drafted, accepted = (sums.get(f"spec_decode_num_{each}_tokens_total") for each in ("draft", "accepted"))
    if drafted is None or accepted is None:
        return None
    return DraftCounts(sums.get("request_success_total"), drafted, accepted)


class DraftCounter:
    """Draft counters of a server, from its metrics page read again and again.

    vLLM and llama.cpp report sums. TensorRT-LLM reports a list of its latest iterations and forgets them; they are
    added up here. Source: TensorRT-LLM, `docs/source/commands/trtllm-serve/trtllm-serve.rst`, "Metrics Endpoint", and
    `SpecDecodingStats` of `cpp/include/tensorrt_llm/executor/types.h`.
    """

    def __init__(self) -> None:
        self._num_drafted = self._num_accepted = 0

    def read(self, page: str) -> DraftCounts | None:
        """The counts so far; None if the server does not count. Raises EngineError for another page."""
        if not page.lstrip().startswith("["):
            return draft_counts(page)
        for iteration in _iterations(page):
            drafts = mapping(mapping(iteration, "iteration").get("specDecodingStats") or {}, "specDecodingStats")
            self._num_drafted += integer(drafts.get("numDraftTokens", 0), "numDraftTokens")
            self._num_accepted += integer(drafts.get("numAcceptedTokens", 0), "numAcceptedTokens")
        return DraftCounts(None, self._num_drafted, self._num_accepted)


def _iterations(page: str) -> list[Any]:
    try:
        return list(json.loads(page))
    except (ValueError, RecursionError) as error:
        raise EngineError(
            f"/metrics must be JSON, but the server sent {shown(page)} ({type(error).__name__})"
        ) from None
