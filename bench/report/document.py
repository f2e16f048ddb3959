"""What a report says, as plain data: chapters of sentences, tables and pictures.

`bench.report.chapters` decides it; `bench.report.html.page` and `bench.report.markdown` write it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.charts.model import Picture


@dataclass(frozen=True, slots=True)
class Heading:
    """Of a table's column. name: the record's field that it shows, or "" for what is no field."""

    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts, one for each heading. caption: what they are of. sortable: whether other orders make sense."""

    headings: tuple[Heading, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    sortable: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(f"row={row} must have {len(self.headings)} cells, one for each heading")


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what is true of them."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Command:
    """Something to type."""

    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """A number that answers the question, and in a sentence what it is."""

    number: str
    sentence: str


Part = str | Table | Facts | Command | Picture


@dataclass(frozen=True, slots=True)
class Section:
    """name: for links."""

    name: str
    title: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Chapter:
    """A run, or what differs between two. about: in a line or two, of what it is. cards: the answer."""

    name: str
    title: str
    about: tuple[str, ...]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True)
class Document:
    title: str
    chapters: tuple[Chapter, ...]
    glossary: Table


def section(name: str, title: str, *parts: Part) -> list[Section]:
    """A section, or none if it has nothing to say."""
    told = tuple(part for part in parts if part and not (isinstance(part, Table) and not part.rows))
    return [Section(name, title, told)] if told else []


def table(headings: Sequence[Heading | str], rows: Sequence[Sequence[str]], caption: str = "") -> Table:
    """A table; a heading that is a text shows no field."""
    told = tuple(each if isinstance(each, Heading) else Heading(each) for each in headings)
    return Table(told, tuple(map(tuple, rows)), caption)
