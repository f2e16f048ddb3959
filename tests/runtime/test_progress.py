"""Bars are drawn on terminals and vanish; a log has nothing of them."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.terminal import Terminal
from transformers.utils import logging as transformers_logging

from specdec import Engine
from specdec.runtime.progress import announce, bar, doing, is_shown, log_once, others_bars


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


def test_a_terminal_shows_slow_work_in_progress(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    with doing("loading a model"):
        assert terminal.shown() == "\rloading a model ..."
        with doing("compiling kernels, once"):
            assert "compiling kernels, once ..." in terminal.shown()
        terminal.shown()
    assert set(terminal.shown()) == {"\r", " "}
    assert is_shown()
    announce("it takes a minute")
    assert terminal.shown() == "it takes a minute\r\n"


def test_without_a_terminal_slow_work_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    assert not is_shown()
    caplog.set_level(logging.INFO, "specdec")
    assert is_shown()
    for _ in range(2):
        with doing("measuring what this test measures"):
            pass
    announce("it takes a minute")
    assert caplog.messages == ["measuring what this test measures", "it takes a minute"]
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"method": "ngram", "num_speculative_tokens": "auto"}, ["measuring costs"]),
        ({"method": "ngram", "num_speculative_tokens": 3}, []),
    ],
)
def test_an_engine_shows_the_progress_of_its_construction(options: dict, said: list[str], caplog) -> None:
    log_once.cache_clear()
    caplog.set_level(logging.INFO, "specdec")
    source = str(Path(__file__).parents[2] / "bench" / "catalogue" / "models" / "tiny")
    Engine.load(source, load_format="dummy", device="cpu", **options)
    assert [message for message in caplog.messages if "kernels" not in message] == [f"loading {source}", *said]


@contextmanager
def without_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing states whether other libraries should draw bars."""
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)  # read once
    was = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        yield
    finally:
        if not was:
            transformers_logging.disable_progress_bar()


def test_other_libraries_draw_on_terminals_only(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    with without_settings(monkeypatch):
        for stream, draws in ((log, False), (terminal.stream, True)):
            monkeypatch.setattr(sys, "stderr", stream)
            with others_bars(), transformers_logging.tqdm(total=3, desc="weights", file=stream) as others:
                others.refresh()
            assert transformers_logging.is_progress_bar_enabled()
            assert ("weights" in (terminal.shown() if draws else log.getvalue())) == draws


def test_they_draw_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with without_settings(monkeypatch):
        with pytest.raises(ZeroDivisionError), others_bars():
            1 // transformers_logging.is_progress_bar_enabled()  # by zero: none is drawn here
        assert transformers_logging.is_progress_bar_enabled()


def test_who_has_decided_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with without_settings(monkeypatch):
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")
        with others_bars():
            assert transformers_logging.is_progress_bar_enabled()
