"""A report as a self-contained HTML page: no network, no fonts, and a script only to sort and filter tables.

The markup is in `templates`; Jinja2 fills it in and escapes every text. Colors follow the reader's light or dark mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.records import fields
from bench.report.charts import svg, words
from bench.report.charts.model import Picture
from bench.report.document import Command, Document, Facts, Part, Section, Table

MAX_BYTES = 5_000_000
TEMPLATES = Path(__file__).with_name("templates")
STYLES = (svg.STYLE, TEMPLATES / "page.css")
SCRIPT = TEMPLATES / "page.js"
NUMBER = re.compile(r"[-+]?\d[\d.,]*%?( of \d+| \[.*\])?")
LONG = 48  # letters of a cell that may be wrapped
VERDICTS = {"faster": "good", "slower": "bad", "lossless": "good", "lossy": "bad"}


def render(document: Document, max_bytes: int = MAX_BYTES) -> str:
    """The page. Where it would be larger than `max_bytes`, charts and then table rows are omitted, and it says so.

    Raises ValueError if that does not make it small enough.
    """
    for candidate in (document, *_reductions(document)):
        page = _page(candidate)
        if len(page.encode()) <= max_bytes:
            return page
    raise ValueError(f"the page has {len(page.encode())} bytes and must have at most {max_bytes}; report fewer runs")


def _page(document: Document) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "blocks": _blocks,
        "number_columns": _number_columns,
        "cell_class": _cell_class,
        "heading": words.heading,
        "numbers": words.numbers,
        "svg": lambda picture: Markup(svg.draw(picture)),
        "meaning": lambda name: fields.field(name).meaning,
    }
    style, script = (Markup("".join(path.read_text() for path in paths)) for paths in (STYLES, [SCRIPT]))
    return environment.get_template("page.html").render(document=document, style=style, script=script)


def _blocks(parts: Sequence[Part]) -> Iterator[tuple[str, object]]:
    """(macro, its argument) of each part; charts of the same models and prompts that follow each other are one."""
    macros = {str: "text", Table: "table", Facts: "facts", Command: "command"}
    for about, group in groupby(parts, lambda part: words.heading(part)[1] if isinstance(part, Picture) else None):
        if about is None:
            yield from ((macros[type(part)], part) for part in group)
        else:
            yield "figures", (about, list(group))


def _number_columns(table: Table) -> list[bool]:
    """For each column whether it holds numbers, which are right-aligned, and nothing else; "-" is a missing value."""
    values = [{row[index] for row in table.rows} - {"-"} for index in range(len(table.headings))]
    return [bool(column) and all(map(NUMBER.fullmatch, column)) for column in values]


def _cell_class(text: str) -> str:
    return "long" if len(text) > LONG else VERDICTS.get(text.partition(" (")[0], "")


# ---- smaller pages


def _reductions(document: Document) -> Iterator[Document]:
    """The document with ever fewer charts per section, then without charts and with ever fewer rows per table."""
    for limit in (24, 6, 0):
        yield _mapped(document, partial(_with_charts, limit=limit))
    for limit in (1000, 200):
        yield _mapped(_mapped(document, partial(_with_charts, limit=0)), partial(_with_rows, limit=limit))


def _mapped(document: Document, change: Callable[[Section], Section]) -> Document:
    chapters = [replace(each, sections=tuple(map(change, each.sections))) for each in document.chapters]
    return replace(document, chapters=tuple(chapters))


def _with_charts(section: Section, limit: int) -> Section:
    omitted = {id(part) for part in [part for part in section.parts if isinstance(part, Picture)][limit:]}
    parts = [part for part in section.parts if id(part) not in omitted]
    if omitted:
        parts.insert(0, f"{len(omitted)} charts are omitted to keep the page small; --plots writes all of them.")
    return replace(section, parts=tuple(parts))


def _with_rows(section: Section, limit: int) -> Section:
    return replace(section, parts=tuple(_truncated(part, limit) for part in section.parts))


def _truncated(part: Part, limit: int) -> Part:
    if not isinstance(part, Table) or len(part.rows) <= limit:
        return part
    caption = f"{part.caption}: the first {limit} of {len(part.rows)} rows; --csv has all of them"
    return replace(part, rows=part.rows[:limit], caption=caption)
