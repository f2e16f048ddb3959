"""A client of a vLLM server: streamed completions as token ids, and the counters of its metrics page."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

from bench.engines.servers.streams import Row, parse_queue
from specdec.servers import client
from specdec.servers.errors import EngineError
from specdec.servers.metrics import parse_counters
from specdec.servers.replies import parse_object

T = TypeVar("T")


class Client(client.Client):
    """A client of one vLLM server; arguments and errors as for specdec.servers.client.Client.

    vocab_size: of the model; token ids beyond it are an error.
    """

    def __init__(
        self, url: str, key: str | None, timeout_s: float, vocab_size: int, deadline_s: float = client.DEADLINE_S
    ) -> None:
        super().__init__(url, key, timeout_s, deadline_s)
        self._vocab_size = vocab_size

    def counters(self) -> dict[str, Any]:
        """The server's cumulative counters: finished requests, and draft tokens if it drafts."""
        return parse_counters(self.get("/metrics"))

    def queue(self) -> tuple[float, int] | None:
        """Total seconds that requests waited for a slot, and their number; None if not reported."""
        return parse_queue(self.get("/metrics"))

    def complete_one(self, request: Mapping[str, Any], start_s: float) -> Row:
        """Continue a prompt; times are from `start_s`, a reading of time.perf_counter."""
        row = Row(int(request["max_tokens"]), self._vocab_size)
        with closing(self.events("/v1/completions", request)) as events:
            for event in events:
                now_s = time.perf_counter() - start_s
                row.take(parse_object(event, "an event"), now_s)
        if row.finish_reason is None:
            raise EngineError(f"server={self.url} must finish the completion, but ended the stream; see its log")
        if row.first_s is None:
            raise EngineError(f"server={self.url} must continue the prompt, but emitted no token; see its log")
        return row


def at_once(call: Callable[[int, float], T], number: int) -> list[T]:
    """Make calls concurrently; all of them are repeated, a few times, if the server is busy.

    call: (index, start by time.perf_counter) -> result. number: of calls.
    """
    return client.retried(lambda: concurrently(call, number))


def concurrently(call: Callable[[int, float], T], number: int) -> list[T]:
    """`at_once` without repetitions."""
    start_s = time.perf_counter()
    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(lambda index: call(index, start_s), range(number)))
