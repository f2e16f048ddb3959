"""Progress bars and messages for long operations, shown only if stderr is a terminal and removed when done.

Logs get no bars; what takes long is logged once, at level INFO of the logger "specdec".
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import TextIOWrapper
from typing import TextIO

from tqdm import tqdm


def bar(
    total: int, unit: str, label: str = "", *, initial: int = 0, file: TextIO | None = None, shown: bool = True
) -> tqdm:
    """A progress bar for a `with` statement; `update(n)` advances it by n of `total`.

    initial: number already done. file: where to draw it, if a terminal; stderr by default. shown: False disables it.
    """
    return tqdm(
        total=total,
        unit=unit,
        desc=label or None,
        initial=initial,
        file=file or sys.stderr,
        disable=None if shown else True,  # for tqdm, None disables it unless the file is a terminal
        leave=False,
        dynamic_ncols=True,
    )


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show a message during a long operation: "loading gpt2"."""
    log_once(what)
    with tqdm(desc=what, bar_format="{desc} ...", file=sys.stderr, disable=None, leave=False, dynamic_ncols=True):
        yield


@contextmanager
def others_write() -> Iterator[None]:
    """Leave stderr to a program that writes its own progress there."""
    with tqdm.external_write_mode(file=sys.stderr):
        yield


def is_shown() -> bool:
    """Whether announcements are visible: stderr is a terminal, or INFO is logged."""
    return sys.stderr.isatty() or logging.getLogger("specdec").isEnabledFor(logging.INFO)


def announce(text: str) -> None:
    """Write a line that stays to stderr if it is a terminal, and to the log."""
    logging.getLogger("specdec").info(text)
    if sys.stderr.isatty():
        tqdm.write(text, file=sys.stderr)


@cache
def log_once(what: str) -> None:
    logging.getLogger("specdec").info(what)


def replace_unencodable(*streams: TextIO) -> None:
    """Let streams that are not UTF-8 write ? for characters they cannot encode, instead of raising."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


@contextmanager
def others_bars() -> Iterator[None]:
    """Disable the progress bars of transformers and the hub unless stderr is a terminal.

    Does nothing if HF_HUB_DISABLE_PROGRESS_BARS is set.
    """
    from transformers.utils import logging

    is_decided = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or not logging.is_progress_bar_enabled()
    if is_decided or sys.stderr.isatty():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
