"""Progress of long work: a bar where stderr is a terminal, which goes when the work is done; not a byte in logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TextIO

from tqdm import tqdm


def bar(
    total: int, unit: str, label: str = "", *, initial: int = 0, file: TextIO | None = None, shown: bool = True
) -> tqdm:
    """A bar to be used in a `with` statement; `update(n)` says that n more of `total` are done.

    initial: how many were done before. file: where it is drawn, if it is a terminal; stderr by default.
    shown: False for none at all.
    """
    return tqdm(
        total=total,
        unit=unit,
        desc=label or None,
        initial=initial,
        file=file or sys.stderr,
        disable=None if shown else True,  # None is tqdm's word for: unless the file is a terminal
        leave=False,
        dynamic_ncols=True,
    )


def show_what_can_be_shown(*streams: TextIO) -> None:
    """Let streams that are not UTF-8 write ? for characters that they do not have, instead of ending the program."""
    for stream in streams:
        if isinstance(stream, TextIOWrapper) and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


@contextmanager
def others_bars() -> Iterator[None]:
    """Let transformers and the hub draw their own bars only where stderr is a terminal: they would draw them in logs.

    Whoever sets HF_HUB_DISABLE_PROGRESS_BARS has decided already.
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
