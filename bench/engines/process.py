"""A worker process that answers JSON objects, one a line, and never keeps its caller waiting for ever."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import IO, Any

from bench.engines import EngineError

NUM_LAST_LINES = 25  # of a worker's standard error: what an error message shows
PIPE_BYTES = 1 << 16


class Worker:
    """A running worker. name: what error messages call it.

    It and what it starts are one process group, which `close` kills.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._requests, self._answers = _opened(self._process.stdin), _opened(self._process.stdout)
        errors = _opened(self._process.stderr)
        os.set_blocking(self._requests.fileno(), False)
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._reader = Thread(target=_keep_lines, args=(errors, self._last_lines), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The worker's answer to a request.

        Raises EngineError, and kills the worker, if it ends, says nothing for `timeout_s` seconds, or answers with
        something that is no answer or an error.
        """
        try:
            return self._answer(self._exchange(json.dumps(request).encode() + b"\n", timeout_s))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the worker and whatever it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for stream in (self._requests, self._answers):
            with suppress(BrokenPipeError):
                stream.close()

    def _exchange(self, request: bytes, timeout_s: float) -> bytes:
        """Write a request and read a line, whichever the worker is ready for: neither may block."""
        deadline_s, answer = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                ready = selector.select(deadline_s - time.monotonic())
                if not ready:
                    raise EngineError(self._message(f"must answer within {timeout_s:g} s, but says nothing"))
                for key, _ in ready:
                    if key.fileobj is self._answers:
                        answer += self._read()
                    elif not (request := request[self._write(request) :]):
                        selector.unregister(self._requests)
        return answer

    def _read(self) -> bytes:
        content = os.read(self._answers.fileno(), PIPE_BYTES)
        if not content:
            raise EngineError(self._message(f"must go on, but {self._end()}"))
        return content

    def _write(self, content: bytes) -> int:
        """How much of the content was written; if the worker is dead all of it, as reading will tell."""
        try:
            return os.write(self._requests.fileno(), content[:PIPE_BYTES])
        except BrokenPipeError:
            return len(content)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(self._message(f"must answer with a JSON object, but said {line[:200]!r}"))
        if "error" in answer:
            text = str(answer["error"])
            raise EngineError(f"{self._name}: {text}" if answer.get("explained") else self._message(f"failed: {text}"))
        return answer

    def _end(self) -> str:
        """How the process ended."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its output"
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    def _message(self, text: str) -> str:
        self.close()  # so that the last lines are there
        return f"{self._name} {text}; its last output was:\n" + "\n".join(self._last_lines or ["(nothing)"])


def _keep_lines(stream: IO[bytes], lines: deque[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line.decode(errors="replace").rstrip())


def _opened(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "every stream is a pipe"
    return stream
