"""Fallbacks to slower code: one warning with the cause for users, an error in tests and benchmarks."""

from __future__ import annotations

import logging
import os
from functools import cache

STRICT = "SPECDEC_STRICT"  # environment variable; 1 makes fallbacks errors, as the root conftest.py does


class FallbackError(RuntimeError):
    """Something would silently have run on a slower path than intended."""


def fall_back(what: str, cause: Exception | str) -> None:
    """Warn once about what runs on a slower path and why.

    Raises FallbackError instead if SPECDEC_STRICT is 1: a test or benchmark of code that did not run is worthless.
    """
    message = f"{what}: {_first_line(cause) if isinstance(cause, Exception) else cause}"
    if os.environ.get(STRICT, "0") == "1":
        error = FallbackError(f"{message}; set {STRICT}=0 to continue anyway")
        raise error from (cause if isinstance(cause, Exception) else None)
    _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    logging.getLogger("specdec").warning(message)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
