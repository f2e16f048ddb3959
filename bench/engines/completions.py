"""A client of a vLLM server: streamed completions as token ids, and the counters of its metrics page.

Based on http.client, not httpx: httpx has a timeout per read but no deadline for a whole request, its synchronous
requests cannot be aborted from another thread before the headers arrive, and it takes twice the CPU time per event
(10 µs instead of 5), on the machine whose server is being measured.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Event, Timer
from typing import Any
from urllib.parse import urlsplit

from bench.engines.base import EngineError
from bench.engines.server_answers import (
    MAX_SHOWN,
    Row,
    parse_counters,
    parse_model,
    parse_object,
    parse_queue,
    parse_version,
)
from bench.records.untrusted import printable

BUSY = (429, 502, 503, 504)  # HTTP statuses after which a retry may succeed
MAX_OF_PAGE = 1 << 24  # bytes
MAX_OF_LINE = 1 << 20
DEADLINE_S = 3600.0  # of one request


class BusyError(EngineError):
    """The server is unreachable or overloaded: a retry may succeed."""


class Client:
    """A client of one server. url: http(s)://host:port, with or without /v1. key: the API key, if required.

    vocab_size: of the model; token ids beyond it are an error. timeout_s: per read, and for a whole page.
    deadline_s: for a whole completion.
    Every method raises EngineError on failure. Messages never contain the key, even if the server sends it.
    """

    def __init__(
        self, url: str, key: str | None, timeout_s: float, vocab_size: int, deadline_s: float = DEADLINE_S
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key, self._vocab_size = key, vocab_size
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout_s, self._deadline_s = timeout_s, deadline_s
        self._connected: set[socket.socket] = set()

    def is_healthy(self) -> bool:
        """Whether the server is up and has loaded its model."""
        try:
            with self._request("GET", "/health"):
                return True
        except EngineError:
            return False

    def model(self) -> dict[str, str]:
        """The served model: its name `id` and its source `root`."""
        return parse_model(self._read("/v1/models"))

    def version(self) -> str:
        return parse_version(self._read("/version"))

    def counters(self) -> dict[str, Any]:
        """The server's cumulative counters: finished requests, and draft tokens if it drafts."""
        return parse_counters(self._read("/metrics"))

    def queue(self) -> tuple[float, int] | None:
        """Total seconds that requests waited for a slot, and their number; None if not reported."""
        return parse_queue(self._read("/metrics"))

    def abort(self) -> None:
        """Abort the requests of other threads, which then raise EngineError."""
        for connected in list(self._connected):
            _shut(connected)

    def complete(self, requests: Sequence[Mapping[str, Any]]) -> list[Row]:
        """Continue prompts concurrently; times are from the start of this call."""
        start_s = time.perf_counter()
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(lambda request: self.complete_one(request, start_s), requests))

    def complete_one(self, request: Mapping[str, Any], start_s: float) -> Row:
        """Continue a prompt; times are from `start_s`, a reading of time.perf_counter."""
        row = Row(int(request["max_tokens"]), self._vocab_size)
        with self._request("POST", "/v1/completions", json.dumps(request).encode(), self._deadline_s) as response:
            while line := response.readline(MAX_OF_LINE + 1):
                now_s = time.perf_counter() - start_s
                if len(line) > MAX_OF_LINE:
                    raise EngineError(f"server={self.url} must send lines of at most {MAX_OF_LINE} bytes")
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    row.take(parse_object(self._redacted(line[len(b"data: ") :]), "an event"), now_s)
        if row.finish_reason is None:
            raise EngineError(f"server={self.url} must finish the completion, but ended the stream; see its log")
        if row.first_s is None:
            raise EngineError(f"server={self.url} must continue the prompt, but emitted no token; see its log")
        return row

    def _read(self, path: str) -> str:
        with self._request("GET", path) as response:
            content = response.read(MAX_OF_PAGE + 1)
        if len(content) > MAX_OF_PAGE:
            raise EngineError(f"server={self.url} must answer {path} with at most {MAX_OF_PAGE} bytes")
        return self._redacted(content).decode(errors="replace")

    def _redacted(self, content: bytes) -> bytes:
        """Content of the server without the API key, as it may be printed or recorded."""
        for key in (self._key, self._key.replace("/", "\\/")) if self._key else ():  # some encoders of JSON escape /
            content = content.replace(key.encode(), b"(API key)")
        return content

    @contextmanager
    def _request(
        self, method: str, path: str, body: bytes | None = None, deadline_s: float | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The response to a request, checked for its status. deadline_s: until the response is read completely."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=self._timeout_s)
        connected: Any = None  # the socket, which `connection` may release before the end of the response
        late = Event()

        def end() -> None:
            late.set()
            _shut(connected)

        clock = Timer(deadline_s or self._timeout_s, end)  # read timeouts do not stop a server that sends slowly
        clock.daemon = True
        try:
            try:
                connection.connect()
                connected = connection.sock
                self._connected.add(connected)
                clock.start()
                connection.request(method, parts.path + path, body, self._headers)
            except OSError as error:
                raise BusyError(f"server={self.url} must be reachable ({error}); start it, or check the URL") from None
            with connection.getresponse() as response:  # it may own the socket
                self._check_status(response)
                yield response
            if late.is_set():  # the content may be truncated
                raise TimeoutError
        except (OSError, http.client.HTTPException, EngineError) as error:
            raise self._failure(error, clock.interval if late.is_set() else None) from None
        finally:
            clock.cancel()
            self._connected.discard(connected)
            connection.close()

    def _failure(self, error: Exception, missed_s: float | None) -> EngineError:
        """The EngineError for a failed request. missed_s: the deadline, if that was the reason."""
        if missed_s is not None:
            return EngineError(f"server={self.url} must finish within {missed_s:g} s, but did not; see its log")
        if isinstance(error, EngineError):
            return error
        if isinstance(error, TimeoutError):
            return EngineError(f"server={self.url} must answer within {self._timeout_s:g} s, but did not; see its log")
        return EngineError(f"server={self.url} must stay connected, but the connection broke ({error!r}); see its log")

    def _check_status(self, response: http.client.HTTPResponse) -> None:
        if response.status == 200:
            return
        if response.status in (401, 403):
            raise EngineError(f"server={self.url} must accept the API key; set SPECDEC_SERVER_API_KEY")
        text = self._redacted(response.read(2 * MAX_SHOWN)).decode(errors="replace")[:MAX_SHOWN]
        text = printable(text)
        kind = BusyError if response.status in BUSY else EngineError
        raise kind(f"server={self.url} must accept the request, but answered {response.status}: {text}")


def _shut(connected: socket.socket) -> None:
    """Shut down a connection, which wakes up threads that wait for it."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
