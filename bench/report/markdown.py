"""A report as Markdown, without its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from bench.report.document import Chapter, Command, Document, Facts, Part, Section, Table

SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~&])")


def render(document: Document) -> str:
    lines = [f"# {escape(document.title)}"]
    for chapter in document.chapters:
        lines += _chapter(chapter)
    lines += ["", "## Glossary", "", *_table(document.glossary)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Text in one line, with Markdown's special characters escaped."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _chapter(chapter: Chapter) -> Iterator[str]:
    yield from ("", f"## {escape(chapter.title)}", "")
    yield from (f"{escape(line)}  " for line in chapter.about)
    yield ""
    yield from (f"- **{escape(card.number)}** {escape(card.sentence)}" for card in chapter.cards)
    for section in chapter.sections:
        yield from _section(section)


def _section(section: Section) -> Iterator[str]:
    parts = [line for part in section.parts for line in _part(part)]
    if parts:
        yield from ("", f"### {escape(section.title)}", *parts)


def _part(part: Part) -> Iterator[str]:
    match part:
        case str():
            yield from ("", escape(part))
        case Table():
            yield from (("", f"**{escape(part.caption)}**") if part.caption else ())
            yield from ("", *_table(part))
        case Facts():
            yield from ("", *(f"- {escape(name)}: {escape(value)}" for name, value in part.rows))
        case Command():
            yield from ("", *(f"    {line}" for line in part.text.splitlines()))


def _table(table: Table) -> Iterator[str]:
    yield _row([heading.text for heading in table.headings])
    yield "|" + "---|" * len(table.headings)
    yield from map(_row, table.rows)


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"
