"""How workers talk: JSON lines on the standard input and output, without other dependencies.

Output of libraries goes to the standard error. A worker ends with its input, or with its parent process. An answer with
"error" is an error message.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Refused(ValueError):
    """A request that cannot be fulfilled; the message needs no traceback."""


def main(serve: Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]) -> None:
    """Answer requests until the input ends. serve: yields an answer for each."""
    answers = take_stdout()
    requests = map(json.loads, iter(sys.stdin.readline, ""))
    try:
        for answer in serve(requests):
            print(json.dumps(answer), file=answers, flush=True)
    except Refused as error:
        print(json.dumps({"error": str(error), "explained": True}), file=answers, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        raise  # the traceback goes to the standard error


def take_stdout() -> TextIO:
    """Reserve the standard output for answers: redirects file descriptor 1 to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    end_with_parent()
    return answers


def end_with_parent() -> None:
    """On Linux, have the kernel kill this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
