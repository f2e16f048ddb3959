"""A client of a vLLM server: streamed completions as token ids, and the counters of its metrics page."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from bench.engines import EngineError

BUSY = (429, 502, 503, 504)  # statuses of a server that may answer if asked again
SAMPLE = re.compile(r"^(?P<name>[\w:]+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
POSITION = re.compile(r'position="(\d+)"')
QUEUE = "vllm:request_queue_time_seconds"
PREFIX = "vllm:spec_decode_num_"
COUNTERS = {"num_drafts": "drafts", "num_drafted": "draft_tokens", "num_accepted": "accepted_tokens"}


class BusyError(EngineError):
    """The server could not be reached, or has too much to do: the same request may succeed later."""


class Client:
    """Talks to one server. url: http(s)://host:port, with or without /v1. key: the API key, if it asks for one.

    timeout_s: how long the server may say nothing. Every method raises EngineError if it fails.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout_s = timeout_s
        self._connected: set[socket.socket] = set()

    def is_healthy(self) -> bool:
        """Whether it is up and has loaded its model."""
        try:
            with self._request("GET", "/health"):
                return True
        except EngineError:
            return False

    def model(self) -> dict[str, Any]:
        """The model that it serves; `id` is its name."""
        models: list[dict[str, Any]] = json.loads(self._read("/v1/models"))["data"]
        return models[0]

    def version(self) -> str:
        return str(json.loads(self._read("/version"))["version"])

    def counters(self) -> dict[str, Any]:
        """Its cumulative counters: requests finished, and of drafts if it makes any."""
        return parse_counters(self._read("/metrics"))

    def queue(self) -> tuple[float, int] | None:
        """Seconds that requests have waited for a slot, and how many requests; None if it does not tell."""
        return parse_queue(self._read("/metrics"))

    def abort(self) -> None:
        """Break off the requests that other threads wait for; they raise EngineError."""
        for connected in list(self._connected):
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Continue prompts side by side. Each row is as a worker's; times are from the start of this call."""
        start_s = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self.complete_one(request, start_s), requests))

    def complete_one(self, request: Mapping[str, Any], start_s: float) -> dict[str, Any]:
        """Continue a prompt; times are from `start_s`, a reading of time.perf_counter."""
        row = new_row()
        with self._request("POST", "/v1/completions", json.dumps(request).encode()) as response:
            for line in response:
                now_s = time.perf_counter() - start_s
                if line.startswith(b"data: {"):
                    take(row, json.loads(line[len(b"data: ") :]), now_s)
        if row["finish_reason"] is None:
            raise EngineError(f"server={self.url} must finish what it began, but ended the stream; see its own log")
        return row

    def _read(self, path: str) -> str:
        with self._request("GET", path) as response:
            return response.read().decode()

    @contextmanager
    def _request(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """The response to a request, if its status says that it is one."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self._timeout_s)
        connected: Any = None  # a connection lets go of its socket before the response has ended
        try:
            try:
                connection.connect()
                connected = connection.sock
                self._connected.add(connected)
                connection.request(method, parts.path + path, body, self._headers)
            except OSError as error:
                raise BusyError(f"server={self.url} must be reachable ({error}); start it, or check the URL") from error
            response = connection.getresponse()
            self._check_status(response)
            yield response
        except TimeoutError as error:
            raise EngineError(
                f"server={self.url} must answer within {self._timeout_s:g} s, but says nothing; see its own log"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"server={self.url} must go on, but the connection broke ({error!r})") from error
        finally:
            self._connected.discard(connected)
            connection.close()

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        if response.status == 200:
            return
        if response.status in (401, 403):
            raise EngineError(f"server={self.url} must accept the API key; put it into SPECDEC_SERVER_API_KEY")
        text = response.read(2000).decode(errors="replace")
        kind = BusyError if response.status in BUSY else EngineError
        raise kind(f"server={self.url} must accept the request, but answered {response.status}: {text}")


def new_row() -> dict[str, Any]:
    return {"token_ids": [], "emitted": [], "first_s": None, "last_s": None, "finish_reason": None, "drafts": None}


def take(row: dict[str, Any], event: Mapping[str, Any], now_s: float) -> None:
    """Add an event of a stream to what became of its prompt. Raises EngineError if the event says so."""
    if "error" in event:
        raise EngineError(f"the server must continue the prompt, but says: {event['error']}")
    for choice in event.get("choices", ()):
        tokens = choice.get("token_ids")
        if tokens is None:
            raise EngineError("the server must return token ids, which vLLM does since 0.11; use a newer version")
        if tokens:
            row["token_ids"] += tokens
            row["emitted"].append(len(tokens))
            row["first_s"] = now_s if row["first_s"] is None else row["first_s"]
            row["last_s"] = now_s
        row["finish_reason"] = choice["finish_reason"] or row["finish_reason"]
    drafts = (event.get("metrics") or {}).get("speculative_decoding")
    if drafts:
        row["drafts"] = {"histogram": drafts["acceptance_histogram"], "num_drafted": drafts["num_draft_tokens"]}


def parse_counters(page: str) -> dict[str, Any]:
    """Counters of a Prometheus page, summed over engines: `num_finished`, and of drafts if there are any."""
    sums: dict[str, int] = {}
    accepted_at: dict[int, int] = {}
    for line in page.splitlines():
        if sample := SAMPLE.match(line):
            name, value = sample["name"], float(sample["value"])
            position = POSITION.search(sample["labels"] or "")
            if name == f"{PREFIX}accepted_tokens_per_pos_total" and position:
                index = int(position[1])
                accepted_at[index] = accepted_at.get(index, 0) + int(value)
            elif name.startswith((PREFIX, "vllm:request_success")) and name.endswith("_total"):
                sums[name] = sums.get(name, 0) + int(value)
    finished = {"num_finished": sums.get("vllm:request_success_total", 0)}
    if f"{PREFIX}drafts_total" not in sums:
        return finished
    drafts = {name: sums[f"{PREFIX}{key}_total"] for name, key in COUNTERS.items()}
    return finished | drafts | {"accepted_at": [accepted_at[index] for index in sorted(accepted_at)]}


def parse_queue(page: str) -> tuple[float, int] | None:
    """Seconds that requests have waited for a slot and how many requests, of a Prometheus page, summed over engines."""
    samples = [sample for line in page.splitlines() if (sample := SAMPLE.match(line))]
    seconds, numbers = (
        [float(sample["value"]) for sample in samples if sample["name"] == f"{QUEUE}_{part}"]
        for part in ("sum", "count")
    )
    return (sum(seconds), int(sum(numbers))) if seconds and numbers else None
