"""A chapter of a report as lines for a terminal, without pictures and a few sections of the page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from bench.records import fields
from bench.report.charts.model import Picture
from bench.report.document import Chapter, Heading, Section, Table
from bench.report.terminal import grid

PAGE_ONLY = ("time", "machine")  # sections of details


def render(chapter: Chapter) -> Iterator[str]:
    """The answers, the sections with their tables, and one legend of all columns."""
    yield from (chapter.title, "=" * len(chapter.title)) if chapter.title else ()
    for line in chapter.about:
        yield from wrapped(line)
    yield ""
    width = max((len(card.number) for card in chapter.cards), default=0)
    for card in chapter.cards:
        yield from wrapped(f"{card.number:>{width}}  {card.sentence}", " " * (width + 2))
    shown = [section for section in chapter.sections if _is_shown(section)]
    for section in shown:
        yield from ("", section.title, "-" * len(section.title))
        for part in section.parts:
            if isinstance(part, str):
                yield from wrapped(part)
            elif isinstance(part, Table):
                yield from _table(part)
    tables = [part for section in shown for part in section.parts if isinstance(part, Table)]
    yield from _legend([heading for table in tables for heading in table.headings])


def wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, grid.WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _is_shown(section: Section) -> bool:
    """Whether anything is left without the pictures."""
    if section.name in PAGE_ONLY:
        return False
    has_pictures, has_tables = (any(isinstance(part, kind) for part in section.parts) for kind in (Picture, Table))
    return has_tables or not has_pictures


def _table(table: Table) -> Iterator[str]:
    yield from ("", *wrapped(f"{table.caption}:")) if table.caption else ("",)
    yield from grid.lines(table)


def _legend(headings: Sequence[Heading]) -> Iterator[str]:
    """A line for each column that shows a field."""
    meanings = {each.text: fields.field(each.name).meaning for each in headings if each.name}
    if meanings:
        yield from ("", "Columns", "-------")
    for heading, meaning in meanings.items():
        yield from wrapped(f"{heading}: {meaning}", "    ")
