"""Parses and validates the answers of a server. They are untrusted: every invalid answer raises an EngineError.

Servers and proxies may send anything: token ids beyond the vocabulary, counters that are not numbers, answers without
an end. Such a cell must fail instead of recording a wrong result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.engines.base import EngineError
from bench.records.untrusted import printable

MAX_COUNT = 1 << 53  # of any counter; larger floating-point numbers of a metrics page are not exact
MAX_OF_VERSION = 100  # characters
MAX_SHOWN = 2000  # characters of a server's error message
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
POSITION = re.compile(r'position="(\d{1,6})"')
QUEUE = "vllm:request_queue_time_seconds"
PREFIX = "vllm:spec_decode_num_"
COUNTERS = {"num_drafts": "drafts", "num_drafted": "draft_tokens", "num_accepted": "accepted_tokens"}
ENDS = ("stop", "length")


@dataclass(slots=True)
class Row:
    """The partial result of a prompt.

    max_tokens: of the request. vocab_size: bound on token ids. emitted: number of tokens per event. first_s, last_s:
    time of the first and the last token. drafts: the server's counters for this prompt, if reported.
    """

    max_tokens: int
    vocab_size: int
    token_ids: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    finish_reason: str | None = None
    drafts: dict[str, Any] | None = None

    def take(self, event: Mapping[str, Any], now_s: float) -> None:
        """Add an event of a stream. Raises EngineError if it reports an error or is invalid."""
        if "error" in event:
            raise EngineError(
                f"the server must continue the prompt, but answered: {printable(str(event['error'])[:MAX_SHOWN])}"
            )
        for choice in _list(event, "choices", ()):
            self._take_choice(_mapping(choice, "choices"), now_s)
        metrics = event.get("metrics")
        drafts = _mapping(metrics, "metrics").get("speculative_decoding") if metrics else None
        if drafts:
            self.drafts = _drafts(_mapping(drafts, "speculative_decoding"))

    def _take_choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        if choice.get("token_ids") is None:
            raise EngineError("the server must return token ids, which vLLM does since 0.11; use a newer version")
        tokens = [_integer(token, "token_ids", self.vocab_size) for token in _list(choice, "token_ids")]
        if tokens and self.finish_reason:
            raise EngineError("the server must send no tokens after its finish_reason, but did; see its log")
        self.token_ids += tokens
        if len(self.token_ids) > self.max_tokens:
            raise EngineError(f"the server must stop at max_tokens={self.max_tokens}, but did not; see its log")
        if tokens:
            self.emitted.append(len(tokens))
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        reason = choice.get("finish_reason")
        if reason not in (None, *ENDS):
            raise EngineError(f"finish_reason={shown(reason)} must be stop or length; see the server's log")
        self.finish_reason = reason or self.finish_reason


def parse_object(text: str | bytes, name: str) -> dict[str, Any]:
    """A JSON object. name: for error messages."""
    try:
        return dict(_mapping(json.loads(text), name))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{name} must be JSON, but the server sent {shown(text)} ({type(error).__name__})") from None


def parse_model(text: str) -> dict[str, str]:
    """`id` and `root` of the first model of a server."""
    models = _list(parse_object(text, "/v1/models"), "data")
    model = _mapping(models[0] if models else None, "/v1/models")
    name, root = model.get("id"), model.get("root")
    if not isinstance(name, str) or not isinstance(root, str | None):
        raise EngineError(f"the id of a served model must be a string, but is {shown(name)}; is this a vLLM server?")
    return {"id": printable(name), "root": printable(root or name)}


def parse_version(text: str) -> str:
    version = parse_object(text, "/version").get("version")
    if not isinstance(version, str):
        raise EngineError(f"version={shown(version)} must be a string; is this a vLLM server?")
    return printable(version[:MAX_OF_VERSION])


def parse_counters(page: str) -> dict[str, Any]:
    """Counters of a Prometheus page, summed over engines: `num_finished`, and those of drafts if the server drafts."""
    sums: dict[str, int] = {}
    accepted_at: dict[int, int] = {}
    for name, labels, value in _samples(page):
        position = POSITION.search(labels)
        if name == f"{PREFIX}accepted_tokens_per_pos_total" and position:
            index = int(position[1])
            accepted_at[index] = accepted_at.get(index, 0) + _count(value, name)
        elif name.startswith((PREFIX, "vllm:request_success")) and name.endswith("_total"):
            sums[name] = sums.get(name, 0) + _count(value, name)
    finished = {"num_finished": sums.get("vllm:request_success_total", 0)}
    if f"{PREFIX}drafts_total" not in sums:
        return finished
    needed = {name: f"{PREFIX}{key}_total" for name, key in COUNTERS.items()}
    if missing := [key for key in needed.values() if key not in sums]:
        raise EngineError(f"the server must report {missing[0]} with {PREFIX}drafts_total; use another version")
    if sorted(accepted_at) != list(range(len(accepted_at))):
        raise EngineError(f"positions of accepted tokens must be 0, 1, ..., but are {shown(sorted(accepted_at))}")
    drafts = {name: sums[key] for name, key in needed.items()}
    return finished | drafts | {"accepted_at": [accepted_at[index] for index in sorted(accepted_at)]}


def parse_queue(page: str) -> tuple[float, int] | None:
    """Total queue time in seconds and number of requests, from a Prometheus page, summed over engines."""
    samples = [(name, value) for name, _, value in _samples(page)]
    seconds, numbers = (
        [_amount(value, name) for name, value in samples if name == f"{QUEUE}_{part}"] for part in ("sum", "count")
    )
    return (sum(seconds), int(sum(numbers))) if seconds and numbers else None


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The increase of counters. Raises EngineError if the counters differ or one has decreased."""
    olds, news = (counters.get("accepted_at", []) for counters in (before, after))
    grown = {name: after[name] - before.get(name, 0) for name in after if name != "accepted_at"}
    accepted_at = [new - old for new, old in zip(news, olds, strict=False)]
    if len(olds) != len(news) or any(increase < 0 for increase in (*grown.values(), *accepted_at)):
        raise EngineError("the server's counters must only increase, but changed otherwise; was it restarted?")
    return grown | {"accepted_at": accepted_at}


def shown(value: Any) -> str:
    """The repr of a value, truncated for error messages."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _samples(page: str) -> Iterator[tuple[str, str, str]]:
    """(name, labels, value) of each sample line."""
    for line in page.splitlines():
        if sample := SAMPLE.match(line):
            yield sample["name"], sample["labels"] or "", sample["value"]


def _amount(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < MAX_COUNT:  # nor NaN
        raise EngineError(f"{name}={shown(text)} must be a number from 0 to 2**53; is this a vLLM server's page?")
    return value


def _count(text: str, name: str) -> int:
    return int(_amount(text, name))


def _integer(value: Any, name: str, bound: int = MAX_COUNT) -> int:
    if type(value) is not int or not 0 <= value < bound:
        raise EngineError(f"{name}={shown(value)} must be integers from 0 and below {bound}; see the server's log")
    return value


def _list(holder: Mapping[str, Any], name: str, default: Any = None) -> list[Any]:
    value = holder.get(name, default)
    if not isinstance(value, list | tuple):
        raise EngineError(f"{name}={shown(value)} must be a list; is this a vLLM server?")
    return list(value)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise EngineError(f"{name}={shown(value)} must be an object; is this a vLLM server?")
    return value


def _drafts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    histogram = [_integer(count, "acceptance_histogram") for count in _list(metrics, "acceptance_histogram")]
    return {"histogram": histogram, "num_drafted": _integer(metrics.get("num_draft_tokens"), "num_draft_tokens")}
