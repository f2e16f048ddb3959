"""Run something in a fork of this process, under a time limit."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def in_fork(call: Callable[[], Answer], timeout_s: float | None, *, quiet: bool = True) -> Answer | None:
    """What a call returns in a fork of this process; None if it takes longer than timeout_s. quiet: without its output.

    An empty answer means that the fork ended before the call did.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            if quiet:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            os.write(writing, json.dumps(call()).encode())
        finally:  # whatever happens, a fork must not go on with the session
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        ready = select.select([answer], [], [], timeout_s)[0]
        if not ready:
            os.killpg(pid, signal.SIGKILL)
        seen = answer.read()
    os.waitpid(pid, 0)
    return json.loads(seen or "{}") if ready else None


class Zygote:
    """A fork that answers requests, each in a fork of its own: the state of this process as it is now, kept."""

    def __init__(self, call: Callable[[Any], Answer], timeout_s: float) -> None:
        (requests, self._requests), (self._answers, answers) = os.pipe(), os.pipe()
        if os.fork() == 0:
            try:
                os.close(self._requests)  # or the end of the file is never seen
                with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
                    for line in lines:
                        request = json.loads(line)
                        print(json.dumps(in_fork(lambda: call(request), timeout_s)), file=out, flush=True)  # noqa: B023
            finally:
                os._exit(0)
        os.close(requests)
        os.close(answers)
        self._lines = os.fdopen(self._answers)

    def ask(self, request: Any) -> Answer | None:
        os.write(self._requests, f"{json.dumps(request)}\n".encode())
        return json.loads(self._lines.readline())
