"""The transport of all clients of servers: requests with deadlines, limits, and API keys that are never shown.

Based on http.client, not httpx: httpx has a timeout per read but no deadline for a whole request, its synchronous
requests cannot be aborted from another thread before the headers arrive, and it takes twice the CPU time per event
(10 µs instead of 5), on the machine whose server is being measured.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event, Timer
from typing import Any, TypeVar
from urllib.parse import urlsplit

from specdec.runtime.printable import printable
from specdec.servers.errors import BusyError, EngineError
from specdec.servers.replies import MAX_SHOWN, parse_model, parse_models, parse_object, parse_version

BUSY = (429, 502, 503, 504)  # HTTP statuses after which a retry may succeed
MAX_OF_PAGE = 1 << 24  # bytes
MAX_OF_LINE = 1 << 20
DEADLINE_S = 3600.0  # of one request
KEY_VARIABLE = "SPECDEC_SERVER_API_KEY"
NUM_ATTEMPTS = 3  # to reach a busy server
FIRST_PAUSE_S = 0.5  # between attempts; doubled after each

T = TypeVar("T")


class Client:
    """A client of one server. url: http(s)://host:port, with or without /v1. key: the API key, if required.

    timeout_s: per read, and for a whole page. deadline_s: for a whole completion.
    Every method raises EngineError on failure. Messages never contain the key, even if the server sends it.
    """

    def __init__(self, url: str, key: str | None, timeout_s: float, deadline_s: float = DEADLINE_S) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
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
        """The served model: its name `id`, its source `root` and the kind of its server, `owned_by`."""
        return parse_model(self.get("/v1/models"))

    def models(self) -> list[dict[str, str]]:
        """All served models, as `model` describes one."""
        return parse_models(self.get("/v1/models"))

    def version(self) -> str:
        return parse_version(self.get("/version"))

    def build(self) -> str:
        """The build of a llama-server."""
        return parse_version(self.get("/props"), "build_info")

    def abort(self) -> None:
        """Abort the requests of other threads, which then raise EngineError."""
        for connected in list(self._connected):
            _shut(connected)

    def get(self, path: str) -> str:
        """A page as text."""
        with self._request("GET", path) as response:
            return self._content(response, path).decode(errors="replace")

    def post(self, path: str, request: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that answers a request."""
        with self._request("POST", path, json.dumps(request).encode(), self._deadline_s) as response:
            content = self._content(response, path)
        return parse_object(content, path)

    def events(self, path: str, request: Mapping[str, Any]) -> Generator[bytes, None, None]:
        """The events of a streamed answer, each yielded when it arrives: JSON, not parsed yet."""
        with self._request("POST", path, json.dumps(request).encode(), self._deadline_s) as response:
            while line := response.readline(MAX_OF_LINE + 1):
                if len(line) > MAX_OF_LINE:
                    raise EngineError(f"server={self.url} must send lines of at most {MAX_OF_LINE} bytes")
                if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                    yield self._redacted(line[len(b"data: ") :])

    def _content(self, response: http.client.HTTPResponse, path: str) -> bytes:
        content = response.read(MAX_OF_PAGE + 1)
        if len(content) > MAX_OF_PAGE:
            raise EngineError(f"server={self.url} must answer {path} with at most {MAX_OF_PAGE} bytes")
        return self._redacted(content)

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


def retried(call: Callable[[], T]) -> T:
    """The result of a call, which is repeated a few times if the server is busy. Raises as the last call does."""
    for attempt in range(1, NUM_ATTEMPTS):
        try:
            return call()
        except BusyError:
            time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
    return call()


def _shut(connected: socket.socket) -> None:
    """Shut down a connection, which wakes up threads that wait for it."""
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def api_key(environment: Mapping[str, str] = os.environ, variable: str = KEY_VARIABLE) -> str | None:
    """A server's API key, without surrounding whitespace. Raises EngineError for an invalid one, without showing it."""
    key = environment.get(variable, "").strip()
    if not re.fullmatch(r"[\w.~+/=-]*", key, re.ASCII):
        raise EngineError(f"{variable} must contain only letters, digits and -._~+/=, to fit into a header; correct it")
    return key or None
