"""Where a fast way cannot be taken: for users one warning that names the cause, in tests and benchmarks an error."""

from __future__ import annotations

import logging
import os
from functools import cache

STRICT = "SPECDEC_STRICT"  # environment variable; 1 makes fallbacks errors, as the root conftest.py does


class FallbackError(RuntimeError):
    """Something would have run in a slower way than it was meant to, unnoticed."""


def fall_back(what: str, cause: Exception | str) -> None:
    """Say once what runs in a slower way, and why.

    Raises FallbackError instead if SPECDEC_STRICT is 1: a test or a benchmark of something that did not run is worth
    nothing.
    """
    message = f"{what}: {_first_line(cause) if isinstance(cause, Exception) else cause}"
    if os.environ.get(STRICT, "0") == "1":
        error = FallbackError(f"{message}; to go on all the same, set {STRICT}=0")
        raise error from (cause if isinstance(cause, Exception) else None)
    _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    logging.getLogger("specdec").warning(message)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
