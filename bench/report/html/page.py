"""A report as one HTML page that needs nothing else: no network, no fonts, and no script to show everything.

The script only sorts and filters tables. Colours are those of light or dark, as the reader's system asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.records import fields
from bench.report.charts.model import Bars, Picture, Rows
from bench.report.document import Card, Chapter, Command, Document, Facts, Part, Section, Table
from bench.report.html import svg
from bench.report.html.markup import Markup, element

MAX_BYTES = 5_000_000
STYLE = Path(__file__).with_name("page.css")
SCRIPT = Path(__file__).with_name("page.js")


def render(document: Document, max_bytes: int = MAX_BYTES) -> str:
    """The page; where it would be larger, first pictures are left out, then rows of tables, and it says so."""
    for cut in (document, *_cuts(document)):
        page = _page(cut)
        if len(page.encode()) <= max_bytes:
            return page
    raise ValueError(f"the page has {len(page.encode())} bytes and must have at most {max_bytes}; report fewer runs")


def _cuts(document: Document) -> Iterator[Document]:
    """With ever fewer pictures in a section, then without any and with ever fewer rows in a table."""
    for most in (24, 6, 0):
        yield _mapped(document, lambda section, most=most: _with_pictures(section, most))
    for most in (1000, 200):
        yield _mapped(document, lambda section, most=most: _with_rows(_with_pictures(section, 0), most))


def _mapped(document: Document, change) -> Document:  # type: ignore[no-untyped-def]
    chapters = [replace(each, sections=tuple(map(change, each.sections))) for each in document.chapters]
    return replace(document, chapters=tuple(chapters))


def _with_pictures(section: Section, most: int) -> Section:
    pictures = [part for part in section.parts if isinstance(part, Picture)]
    left_out = set(map(id, pictures[most:]))
    parts = [part for part in section.parts if id(part) not in left_out]
    if left_out:
        parts.insert(0, f"{len(left_out)} pictures are left out, to keep the page small; --plots draws them all.")
    return replace(section, parts=tuple(parts))


def _with_rows(section: Section, most: int) -> Section:
    return replace(section, parts=tuple(_cut_rows(part, most) for part in section.parts))


def _cut_rows(part: Part, most: int) -> Part:
    if not isinstance(part, Table) or len(part.rows) <= most:
        return part
    caption = f"{part.caption}: the first {most} of {len(part.rows)} rows; --csv has all cells"
    return replace(part, rows=part.rows[:most], caption=caption)


def _page(document: Document) -> str:
    head = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", document.title),
        element("style", Markup(STYLE.read_text())),
    )
    body = (
        element("header", element("h1", document.title), *_contents(document)),
        element("main", *map(_chapter, document.chapters), _glossary(document.glossary)),
        element("script", Markup(SCRIPT.read_text())),
    )
    page = element("html", element("head", *head), "\n", element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _contents(document: Document) -> Iterator[Markup]:
    """Links to all sections; with several chapters, to those."""
    if len(document.chapters) == 1:
        (chapter,) = document.chapters
        links = [(f"{chapter.name}-{each.name}", each.title) for each in chapter.sections]
    else:
        links = [(each.name, each.title) for each in document.chapters]
    links.append(("glossary", "Glossary"))
    yield element("nav", *(element("a", title, href=f"#{name}") for name, title in links))


def _chapter(chapter: Chapter) -> Markup:
    return element(
        "article",
        element("h2", chapter.title),
        *(element("p", line, class_="about") for line in chapter.about),
        element("div", *map(_card, chapter.cards), class_="cards"),
        *(_section(chapter, each) for each in chapter.sections),
        id=chapter.name,
    )


def _card(card: Card) -> Markup:
    return element("div", element("strong", card.number), element("span", card.sentence), class_="card")


def _section(chapter: Chapter, section: Section) -> Markup:
    return element("section", element("h3", section.title), *_parts(section.parts), id=f"{chapter.name}-{section.name}")


def _parts(parts: tuple[Part, ...]) -> Iterator[Markup]:
    """Pictures that follow each other stand side by side, under what they are of."""
    figures: list[Picture] = []
    for part in (*parts, None):
        if isinstance(part, Picture):
            figures.append(part)
            continue
        yield from _figures(figures)
        figures = []
        if isinstance(part, Table):
            yield table(part)
        elif isinstance(part, Facts):
            facts = [element("div", element("dt", name), element("dd", value)) for name, value in part.rows]
            yield element("dl", *facts, class_="facts")
        elif isinstance(part, Command):
            yield element("pre", element("code", part.text))
        elif part is not None:
            yield element("p", part)


def _figures(pictures: list[Picture]) -> Iterator[Markup]:
    by_subject: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_subject.setdefault(svg.title(picture)[1], []).append(picture)
    for about, group in by_subject.items():
        yield element("h4", about)
        yield element("div", *map(_figure, group), class_="figures")


def _figure(picture: Picture) -> Markup:
    headings, rows = svg.numbers(picture)
    cells = [element("tr", *(element("td", text) for text in row)) for row in rows]
    told = element("table", element("tr", *(element("th", text) for text in headings)), *cells)
    details = element("details", element("summary", "numbers"), element("div", told, class_="scroll"))
    caption = element("figcaption", svg.title(picture)[0])
    wide = {"class_": "tall"} if isinstance(picture, Rows | Bars) else {}
    return element("figure", caption, svg.draw(picture), svg.legend(picture), details, **wide)


def table(part: Table) -> Markup:
    """With what each column means behind its heading."""
    headings = [
        element("th", each.text, scope="col", title=fields.column(each.name).meaning if each.name else None)
        for each in part.headings
    ]
    rows = [element("tr", *map(_cell, row)) for row in part.rows]
    caption = [element("caption", part.caption)] if part.caption else []
    whole = element("table", *caption, element("thead", element("tr", *headings)), element("tbody", *rows))
    return element("div", whole, class_="scroll sortable" if part.sortable else "scroll")


def _term(heading: str, name: str) -> list[Markup]:
    """A heading, and the field's name where it is another."""
    code = element("code", name)
    return [code] if heading.replace(" ", "_") == name else [element("b", heading), Markup(" "), code]


LONG = 48  # letters of a text that may be broken into lines
VERDICTS = {"faster": "good", "slower": "bad", "lossless": "good", "lossy": "bad"}


def _cell(text: str) -> Markup:
    return element("td", text, class_="long" if len(text) > LONG else VERDICTS.get(text.partition(" (")[0]))


def _glossary(glossary: Table) -> Markup:
    entries = [
        element(
            "div",
            element("dt", *_term(heading, name), element("code", "" if unit in ("-", "1") else f" in {unit}")),
            element("dd", meaning),
        )
        for heading, name, unit, meaning in glossary.rows
    ]
    sentence = "Each number of the tables, and each column of the CSV file, which has SI units."
    return element(
        "article",
        element("h2", "Glossary"),
        element("p", sentence, class_="about"),
        element("dl", *entries),
        id="glossary",
    )
