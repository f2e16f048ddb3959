"""What a server says, as values: the one place where it is read. Nothing of it is trusted; all errors are EngineErrors.

Servers are other people's programs, and what stands between may be anything: ids that no vocabulary has, counters that
are no numbers and answers without an end must fail the cell, not become its result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.engines.base import EngineError
from bench.records.untrusted import printable

MAX_COUNT = 1 << 53  # of any counter; beyond it floating-point numbers of a metrics page are not exact
MAX_OF_VERSION = 100  # characters
MAX_SHOWN = 2000  # characters of what a server says of itself in an error
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
POSITION = re.compile(r'position="(\d{1,6})"')
QUEUE = "vllm:request_queue_time_seconds"
PREFIX = "vllm:spec_decode_num_"
COUNTERS = {"num_drafts": "drafts", "num_drafted": "draft_tokens", "num_accepted": "accepted_tokens"}
ENDS = ("stop", "length")


@dataclass(slots=True)
class Row:
    """What became of a prompt so far.

    max_tokens: as many were asked for. vocab_size: ids are below it. emitted: tokens of each event. first_s, last_s:
    when the first and the last token came. drafts: the server's counters of this prompt, if it tells them.
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
        """Add an event of a stream. Raises EngineError if the event says so, or is not what was asked for."""
        if "error" in event:
            raise EngineError(
                f"the server must continue the prompt, but says: {printable(str(event['error'])[:MAX_SHOWN])}"
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
            raise EngineError("the server must end where it says so, but sent tokens after the end; see its own log")
        self.token_ids += tokens
        if len(self.token_ids) > self.max_tokens:
            raise EngineError(f"the server must end at max_tokens={self.max_tokens}, but went on; see its own log")
        if tokens:
            self.emitted.append(len(tokens))
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        reason = choice.get("finish_reason")
        if reason not in (None, *ENDS):
            raise EngineError(f"finish_reason={shown(reason)} must be stop or length; see the server's own log")
        self.finish_reason = reason or self.finish_reason


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. what: it is called in errors."""
    try:
        return dict(_mapping(json.loads(text), what))
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{what} must be JSON, but the server sent {shown(text)} ({type(error).__name__})") from None


def parse_model(text: str) -> dict[str, str]:
    """`id` and `root` of the first model of a server."""
    models = _list(parse_object(text, "/v1/models"), "data")
    model = _mapping(models[0] if models else None, "/v1/models")
    name, root = model.get("id"), model.get("root")
    if not isinstance(name, str) or not isinstance(root, str | None):
        raise EngineError(f"the id of a served model must be a text, but is {shown(name)}; is this a vLLM server?")
    return {"id": printable(name), "root": printable(root or name)}


def parse_version(text: str) -> str:
    version = parse_object(text, "/version").get("version")
    if not isinstance(version, str):
        raise EngineError(f"version={shown(version)} must be a text; is this a vLLM server?")
    return printable(version[:MAX_OF_VERSION])


def parse_counters(page: str) -> dict[str, Any]:
    """Counters of a Prometheus page, summed over engines: `num_finished`, and of drafts if there are any."""
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
        raise EngineError(f"the server must tell {missing[0]}, as it tells {PREFIX}drafts_total; use another version")
    if sorted(accepted_at) != list(range(len(accepted_at))):
        raise EngineError(f"positions of accepted tokens must be 0, 1, ..., but are {shown(sorted(accepted_at))}")
    drafts = {name: sums[key] for name, key in needed.items()}
    return finished | drafts | {"accepted_at": [accepted_at[index] for index in sorted(accepted_at)]}


def parse_queue(page: str) -> tuple[float, int] | None:
    """Seconds that requests have waited for a slot and how many requests, of a Prometheus page, summed over engines."""
    samples = [(name, value) for name, _, value in _samples(page)]
    seconds, numbers = (
        [_amount(value, name) for name, value in samples if name == f"{QUEUE}_{part}"] for part in ("sum", "count")
    )
    return (sum(seconds), int(sum(numbers))) if seconds and numbers else None


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What counters grew by. Raises EngineError if they are not the same counters, or did not only grow."""
    olds, news = (each.get("accepted_at", []) for each in (before, after))
    grown = {name: after[name] - before.get(name, 0) for name in after if name != "accepted_at"}
    accepted_at = [new - old for new, old in zip(news, olds, strict=False)]
    if len(olds) != len(news) or any(each < 0 for each in (*grown.values(), *accepted_at)):
        raise EngineError("the server's counters must only grow, but others came or they began anew; is it restarted?")
    return grown | {"accepted_at": accepted_at}


def shown(value: Any) -> str:
    """Some of a value, for an error."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _samples(page: str) -> Iterator[tuple[str, str, str]]:
    """(name, labels, value) of each line that has a value."""
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


def _integer(value: Any, name: str, most: int = MAX_COUNT) -> int:
    if type(value) is not int or not 0 <= value < most:
        raise EngineError(f"{name}={shown(value)} must be integers from 0 and below {most}; see the server's log")
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


def _drafts(told: Mapping[str, Any]) -> dict[str, Any]:
    histogram = [_integer(count, "acceptance_histogram") for count in _list(told, "acceptance_histogram")]
    return {"histogram": histogram, "num_drafted": _integer(told.get("num_draft_tokens"), "num_draft_tokens")}
