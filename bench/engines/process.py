"""Child processes of engines, and workers that answer requests as JSON lines, within a timeout."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import IO, Any

from bench.engines.base import EngineError
from specdec.runtime.printable import printable

SECRET = re.compile("KEY$|TOKEN$|SECRET|PASSWORD", re.IGNORECASE)  # environment variables to redact
NUM_LAST_LINES = 25  # of a worker's standard error, shown in error messages
MAX_LINE = 300  # characters
PIPE_BYTES = 1 << 16


def foreign_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables for another interpreter, without those that would make it import from this one."""
    return {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


class Child:
    """A running process and the last lines of its output. name: for error messages.

    It has its own process group, which `close` kills. all_output: capture both output streams and provide no input;
    else only the standard error is captured, and the other streams are pipes.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], *, all_output: bool) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL if all_output else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if all_output else subprocess.PIPE,
            start_new_session=True,
        )
        self._is_closed = False
        self._secrets = [value for name, value in environment.items() if SECRET.search(name) and len(value) > 3]
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        output = opened(self.process.stdout if all_output else self.process.stderr)
        self._reader = Thread(target=_keep_lines, args=(output, self._last_lines), daemon=True)
        self._reader.start()

    def close(self) -> None:
        """Kill the process group."""
        if not self._is_closed:  # later, the id may belong to another process
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self._is_closed = True
        self.process.wait()
        self._reader.join()

    def ends_within(self, timeout_s: float) -> bool:
        """Whether the process ends within a timeout."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        return self.process.returncode is not None

    def end(self) -> str:
        """Describe how the process ended."""
        if not self.ends_within(10):
            return "closed its output"
        status = self.process.returncode
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    def failure(self, text: str) -> EngineError:
        """An error with the last lines of output. Kills the process first, so that the output is complete."""
        self.close()
        lines = "\n".join(self._last_lines or ["(nothing)"])
        for secret in self._secrets:  # some programs print their options
            lines = lines.replace(secret, "(secret)")
        lines = "\n".join(printable(line[:MAX_LINE]) for line in lines.split("\n"))
        return EngineError(f"{self.name} {text}; its last output was:\n{lines}")


class Worker:
    """A process that answers requests. name: for error messages."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._child = Child(name, command, environment, all_output=False)
        self._requests, self._answers = opened(self._child.process.stdin), opened(self._child.process.stdout)
        os.set_blocking(self._requests.fileno(), False)

    @property
    def pid(self) -> int:
        return self._child.process.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """The worker's answer to a request.

        Raises EngineError, and kills the worker, if it ends, does not answer within `timeout_s` seconds, or answers
        with an error or an invalid object.
        """
        try:
            return self._answer(self._exchange(json.dumps(request).encode() + b"\n", timeout_s))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the worker's process group."""
        self._child.close()
        for stream in (self._requests, self._answers):
            with suppress(BrokenPipeError):
                stream.close()

    def _exchange(self, request: bytes, timeout_s: float) -> bytes:
        """Write a request and read a line, without blocking on either."""
        deadline_s, answer = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            selector.register(self._requests, selectors.EVENT_WRITE)
            while not answer.endswith(b"\n"):
                ready = selector.select(deadline_s - time.monotonic())
                if not ready or time.monotonic() > deadline_s:
                    raise self._child.failure(f"must answer within {timeout_s:g} s, but did not")
                for key, _ in ready:
                    if key.fileobj is self._answers:
                        answer += self._read()
                    elif not (request := request[self._write(request) :]):
                        selector.unregister(self._requests)
        return answer

    def _read(self) -> bytes:
        content = os.read(self._answers.fileno(), PIPE_BYTES)
        if not content:
            raise self._child.failure(f"must keep running, but {self._child.end()}")
        return content

    def _write(self, content: bytes) -> int:
        """The number of bytes written; all of them if the worker is dead, which reading will detect."""
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
            raise self._child.failure(f"must answer with a JSON object, but answered {line[:200]!r}")
        if "error" in answer:
            text = str(answer["error"])
            raise (
                EngineError(f"{self._child.name}: {text}")
                if answer.get("explained")
                else self._child.failure(f"failed: {text}")
            )
        return answer


def _keep_lines(stream: IO[bytes], lines: deque[str]) -> None:
    with stream:
        for line in stream:
            lines.append(line.decode(errors="replace").rstrip())


def opened(stream: IO[bytes] | None) -> IO[bytes]:
    """A pipe of a process, asserted to be open."""
    assert stream is not None, "every stream is a pipe"
    return stream
