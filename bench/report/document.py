"""A report as plain data: chapters of sentences, tables and pictures.

`bench.report.chapters` makes it; `bench.report.html`, `bench.report.markdown` and `bench.report.terminal` render it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.report.charts.model import Picture


@dataclass(frozen=True, slots=True)
class Heading:
    """Heading of a column. name: the field shown, "" for none."""

    text: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of texts, one for each heading.

    caption: what they are of. sortable: whether readers may sort it. num_labels: how many columns name a row.
    """

    headings: tuple[Heading, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    sortable: bool = False
    num_labels: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(f"row={row} must have {len(self.headings)} cells, one for each heading")


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A command line."""

    text: str


@dataclass(frozen=True, slots=True)
class Card:
    """A number that answers the question, and a sentence that explains it."""

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
    """A run, or the differences between two. about: its subject in a line or two. cards: the answer."""

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
    """A section, or none if it is empty."""
    kept = tuple(part for part in parts if part and not (isinstance(part, Table) and not part.rows))
    return [Section(name, title, kept)] if kept else []


def table(
    headings: Sequence[Heading | str], rows: Sequence[Sequence[str]], caption: str = "", num_labels: int = 1
) -> Table:
    """A table; a heading given as a text shows no field."""
    named = tuple(each if isinstance(each, Heading) else Heading(each) for each in headings)
    return Table(named, tuple(map(tuple, rows)), caption, num_labels=num_labels)
