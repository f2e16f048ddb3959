"""Parses and validates the streamed answers of a vLLM server. Every invalid answer raises an EngineError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from specdec.runtime.printable import printable
from specdec.servers.errors import EngineError
from specdec.servers.metrics import amount, samples
from specdec.servers.replies import MAX_SHOWN, integer, items, mapping, shown

QUEUE = "vllm:request_queue_time_seconds"
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
        for choice in items(event, "choices", ()):
            self._take_choice(mapping(choice, "choices"), now_s)
        metrics = event.get("metrics")
        drafts = mapping(metrics, "metrics").get("speculative_decoding") if metrics else None
        if drafts:
            self.drafts = _drafts(mapping(drafts, "speculative_decoding"))

    def _take_choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        if choice.get("token_ids") is None:
            raise EngineError("the server must return token ids, which vLLM does since 0.11; use a newer version")
        tokens = [integer(token, "token_ids", self.vocab_size) for token in items(choice, "token_ids")]
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


def parse_queue(page: str) -> tuple[float, int] | None:
    """Total queue time in seconds and number of requests, from a Prometheus page, summed over engines."""
    found = [(name, value) for name, _, value in samples(page)]
    seconds, numbers = (
        [amount(value, name) for name, value in found if name == f"{QUEUE}_{part}"] for part in ("sum", "count")
    )
    return (sum(seconds), int(sum(numbers))) if seconds and numbers else None


def _drafts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    histogram = [integer(count, "acceptance_histogram") for count in items(metrics, "acceptance_histogram")]
    return {"histogram": histogram, "num_drafted": integer(metrics.get("num_draft_tokens"), "num_draft_tokens")}
