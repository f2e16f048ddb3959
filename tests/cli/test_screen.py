"""Tokens shown by their sources."""

from __future__ import annotations

import io
import os

import pytest
from test_streaming import Bytes

from specdec import Chunk
from specdec.cli.screen import Paint, has_colors, pieces
from specdec.requests import Completion

TEXTS = [("a", "accepted"), (" b", "recovered"), ("\n", "bonus"), ("", "accepted")]


@pytest.mark.parametrize(
    ("paint", "shown"),
    [
        (Paint(), "a b\n"),
        (Paint(marks=True), "[+a][~ b][*\n][+]"),
        (Paint(colors=True), "\033[32ma\033[0m\033[4;35m b\033[0m\033[36m\n\033[0m"),
        (Paint(True, True), "\033[32m[+a]\033[0m\033[4;35m[~ b]\033[0m\033[36m[*\n]\033[0m\033[32m[+]\033[0m"),
    ],
)
def test_each_source_is_shown_in_its_own_way(paint: Paint, shown: str) -> None:
    assert "".join(paint(text, source) for text, source in TEXTS) == shown


def test_the_legend_is_shown_as_tokens_are() -> None:
    assert Paint(marks=True).legend() == "[+accepted], [~recovered], [*bonus], plain"
    assert Paint(colors=True).legend({"accepted": "3"}) == (
        "\033[32m3\033[0m, \033[4;35mrecovered\033[0m, \033[36mbonus\033[0m, plain"
    )
    assert [paint.shows for paint in (Paint(), Paint(True), Paint(marks=True))] == [False, True, True]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_of_those_who_want_them(environment: dict[str, str], expected: bool) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master):
        assert has_colors(terminal, environment) == expected
    assert not has_colors(io.StringIO(), environment)


def chunk(tokens: tuple[int, ...], sources: tuple[str, ...], completion: Completion | None = None) -> Chunk:
    return Chunk(0, tokens, sources, None, completion)


def decode(tokens: list[int]) -> str:
    return Bytes().decode(tokens, skip_special_tokens=True)


def test_a_character_comes_with_its_last_token_and_with_that_ones_source() -> None:
    chunks = [chunk((0,), ("bonus",)), chunk((1, 2, 0), ("accepted", "accepted", "recovered"))]
    expected = [("", "bonus"), ("", "accepted"), ("€", "accepted"), ("", "recovered")]
    assert list(pieces(chunks, decode)) == expected


def test_an_incomplete_character_is_returned_at_the_end() -> None:
    done = Completion(0, (0,), (0, 1, 2, 0), None, "length", None, (), 0.0, 0.0, 0.0)
    chunks = [chunk((0, 1, 2), ("bonus", "accepted", "recovered")), chunk((0,), ("bonus",), done)]
    assert [text for text, _ in pieces(chunks, decode)] == ["", "", "€", "\N{REPLACEMENT CHARACTER}"]
