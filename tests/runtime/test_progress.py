"""Bars are drawn on terminals and vanish; a log has nothing of them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.terminal import Terminal
from transformers.utils import logging

from specdec.runtime.progress import bar, others_bars


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


def test_a_terminal_shows_the_bar_and_then_nothing_of_it(terminal: Terminal) -> None:
    with bar(8, "step", "training", initial=2, file=terminal.stream) as steps:
        shown = terminal.shown()
        assert "training:  25%" in shown
        assert "2/8" in shown
        steps.update(3)
        steps.refresh()
        assert "5/8" in terminal.shown()
    left = terminal.shown().split("\r")
    assert {*left[-2]} == {" "}
    assert left[-1] == ""


def test_a_log_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with bar(2, "step") as steps:
        steps.update()
        steps.refresh()
        steps.set_postfix(loss="1")
    assert log.getvalue() == ""


@contextmanager
def told_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nobody has said whether other libraries should draw bars."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)  # read once
    was = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        yield
    finally:
        if not was:
            logging.disable_progress_bar()


def test_other_libraries_draw_on_terminals_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    with told_nothing(monkeypatch):
        for stream, draws in ((log, False), (terminal.stream, True)):
            monkeypatch.setattr(sys, "stderr", stream)
            with others_bars(), logging.tqdm(total=3, desc="weights", file=stream) as others:
                others.refresh()
            assert logging.is_progress_bar_enabled()
            assert ("weights" in (terminal.shown() if draws else log.getvalue())) == draws


def test_they_draw_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with told_nothing(monkeypatch):
        with pytest.raises(ZeroDivisionError), others_bars():
            1 // logging.is_progress_bar_enabled()  # by zero: none is drawn here
        assert logging.is_progress_bar_enabled()


def test_who_has_decided_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with told_nothing(monkeypatch):
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        with others_bars():
            assert logging.is_progress_bar_enabled()
