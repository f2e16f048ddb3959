"""A table as lines of text: at most 80 columns, numbers right-aligned."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence

from bench.report.document import Table

WIDTH = 80
LONG = 24  # cells with more characters are printed below their row
Column = tuple[str, tuple[str, ...]]  # heading, in which "\xa0" keeps words together, and cells


def lines(table: Table) -> list[str]:
    """The table without its empty columns, and headings over several lines.

    Where it is too wide, labels that do not vary become a title; then the table continues below with its labels again,
    or is cut into groups by its first label: whichever is shorter.
    """
    names = [each.text.replace(" %", "\xa0%") for each in table.headings]
    columns = list(zip(names, zip(*table.rows, strict=True), strict=True))
    return [line.replace("\xa0", " ") for line in _fitted(columns, table.num_labels)]


def _fitted(columns: Sequence[Column], num_labels: int) -> list[str]:
    values = [column for column in columns[num_labels:] if set(column[1]) != {"-"}]
    below = [column for column in values if max(map(len, column[1])) > LONG]
    labels, values = list(columns[:num_labels]), [column for column in values if column not in below]
    if _width([*labels, *values]) <= WIDTH:
        return list(_block([*labels, *values], below))
    columns = [*sorted(labels, key=lambda column: len(set(column[1])) > 1), *columns[num_labels:]]
    if num_labels > 1 and len(set(columns[0][1])) == 1 < len(columns[0][1]):
        return _groups(columns, num_labels)
    blocks: list[str] = []
    shown = labels
    for column in values:
        if _width([*shown, column]) > WIDTH:
            blocks, shown = [*blocks, *_block(shown, []), ""], labels
        shown = [*shown, column]
    blocks += _block(shown, below)
    groups = _groups(columns, num_labels) if num_labels > 1 else []
    return min([groups, blocks], key=len) if groups else blocks


def _groups(columns: Sequence[Column], num_labels: int) -> list[str]:
    (heading, labels), *rest = columns
    found = []
    for label in dict.fromkeys(labels):
        rows = [row for row, each in enumerate(labels) if each == label]
        members = [(name, tuple(cells[row] for row in rows)) for name, cells in rest]
        found += [f"{heading} {label}:", *_fitted(members, num_labels - 1)]
    return found


def _width(columns: Sequence[Column]) -> int:
    """With a space between columns; a column is as wide as its cells and the words of its heading."""
    return sum(max(map(len, [*heading.split(" "), *cells])) + 1 for heading, cells in columns) - 1


def _block(columns: Sequence[Column], below: Sequence[Column]) -> Iterator[str]:
    names, cells = zip(*columns, strict=True)
    heads = [
        textwrap.wrap(name, _width([column]), break_on_hyphens=False)
        for name, column in zip(names, columns, strict=True)
    ]
    padded = [[""] * (max(map(len, heads)) - len(head)) + head for head in heads]
    forms = [
        f"{'>' if any(re.match(r'[-+]?[0-9]', cell) for cell in column) else '<'}{_width([(name, column)])}"
        for name, column in columns
    ]
    for head in zip(*padded, strict=True):
        yield " ".join(map(format, head, forms)).rstrip()
    for index, row in enumerate(zip(*cells, strict=True)):
        yield " ".join(map(format, row, forms)).rstrip()
        for note in (column[index] for _, column in below if column[index] != "-"):
            yield from textwrap.wrap(note, WIDTH, initial_indent="    ", subsequent_indent="    ")
