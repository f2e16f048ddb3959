"""The table of fields: what is built, read and shown follows it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import audited, decoded, loaded, printed, sized, write

from bench.records import fields, results
from bench.records.fields import Field
from bench.records.schema import CELL_FIELDS
from bench.report import markdown, rendering
from bench.report.exports import csv_text
from bench.report.html import page

BASELINES = sorted((Path(__file__).parents[3] / "bench" / "baselines").glob("*.json"))
RECORDS = {
    "cells": decoded("ngram", 2),
    "loads": loaded(2.0, "ngram", 2),
    "costs": sized("width", 4, 0.5),
    "certificates": audited("lossless"),
}
TABLES = {"cells": "cells", "loads": "load", "costs": "sizes", "certificates": "audits"}


@pytest.mark.parametrize("kind", fields.KINDS)
def test_a_new_field_is_one_declaration(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one line that computes it, here a value put into the record: every report then shows it."""
    toy = Field(
        "toy_s", float, "s", "Time that a toy takes.", "toy, ms", ".2f", 1e3, tables=TABLES[kind], kinds=(kind,)
    )
    monkeypatch.setitem(fields.FIELDS, toy.name, toy)
    record = RECORDS[kind] | {"toy_s": 0.0125}
    run = results.read(write(tmp_path / "run.json", [record]))
    document = rendering.document([run])
    terminal, html = "\n".join(printed([record])), page.render(document)
    assert "12.50" in terminal
    assert "toy, ms: Time that a toy takes." in terminal
    assert "12.50" in markdown.render(document)
    assert "| toy, ms | toy\\_s | s | Time that a toy takes. |" in markdown.render(document)
    assert "12.50" in html
    assert "Time that a toy takes." in html.partition('id="glossary"')[2]
    header, row = csv_text.render([run]).splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["toy_s"] == "0.0125"
    without = results.read(write(tmp_path / "old.json", [RECORDS[kind]]))
    assert "Time that a toy takes." not in page.render(rendering.document([without]))


@pytest.mark.parametrize("kind", fields.KINDS)
def test_a_missing_required_field_is_an_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Field("toy_s", float, "s", "Time that a toy takes.", kinds=(kind,), needed=(kind,))
    monkeypatch.setitem(fields.FIELDS, toy.name, toy)
    with pytest.raises(ValueError, match="cell cell-0 lacks toy_s; measure it again"):
        results.read(write(tmp_path / "run.json", [RECORDS[kind]]))


def test_an_older_record_has_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Field("toy", str, "", "A toy.", kinds=("cells",), default="bear")
    monkeypatch.setitem(fields.FIELDS, toy.name, toy)
    (record,) = results.read(write(tmp_path / "run.json", [RECORDS["cells"]])).cells
    assert record["toy"] == "bear"


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_committed_records_are_read_as_they_were_written(path: Path) -> None:
    """Each value stays; what a record lacks is the default; each field is declared for its kind, and of its type."""
    written = [each["extra_info"] for each in json.loads(path.read_text())["benchmarks"]]
    run = results.read(path)
    for kind in fields.KINDS:
        of_kind = [record for record in written if results.kind_of(record) == kind]
        for record, read in zip(of_kind, getattr(run, kind), strict=True):
            assert {name: read[name] for name in record} == record
            assert {name: read[name] for name in fields.FIELDS.keys() - record.keys()} == {
                name: fields.FIELDS[name].default for name in fields.FIELDS.keys() - record.keys()
            }
            for name, value in record.items():
                assert kind in fields.field(name).kinds, name
                allowed = fields.field(name).type if fields.field(name).type is not float else float | int
                assert value is None or isinstance(value, allowed), (name, value)


def test_every_declaration_is_sound() -> None:
    for name, field in fields.FIELDS.items():
        assert name == field.name
        assert set(field.needed) <= set(field.kinds) <= set(fields.KINDS), name
        assert field.kinds, name
        assert {*field.ends, *field.beside} <= fields.FIELDS.keys()
        assert (field.unit == "") <= (field.type not in (float,)), name
    assert {name for name in CELL_FIELDS if name != "placement"} <= set(fields.needed("cells"))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        (Field("a", float, "s", "A.", form=".1f", scale=1e3), 0.0125, "12.5"),
        (Field("a", float, "1", "A.", form=".1%"), 0.5, "50.0%"),
        (Field("a", float, "1", "A."), 1234.5, "1.23e+03"),
        (Field("a", int, "tokens", "A."), 20_000, "20,000"),
        (Field("a", int | str, "tokens", "A."), "auto", "auto"),
        (Field("a", float, "1", "A."), None, "-"),
    ],
)
def test_values_are_shown_as_declared(field: Field, value: Any, text: str) -> None:
    assert field.text(value) == text
    assert replace(field, form="").title == "a"
