"""Files of runs: what is in them, what is wrong with them, and shards that are one campaign."""

from __future__ import annotations

import csv
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import MACHINE, audited, decoded, document, loaded, sized, write

from bench.measure.journal import Entry, Journal
from bench.records import campaigns, results
from bench.report import markdown, rendering
from bench.report.exports import csv_text
from bench.report.html import page
from specdec.runtime import printable

ROOT = Path(__file__).parents[3]


def test_records_are_sorted_by_kind(tmp_path: Path) -> None:
    records = [decoded("ngram", 2), sized("width", 1, 0.5), audited("lossless"), loaded(3.0, "ngram", 2)]
    run = results.read(write(tmp_path / "run.json", records))
    assert [(record["method"], record["rate"]) for record in run.cells] == [("ngram", None)]
    assert [record["rate"] for record in run.loads] == [3.0]
    assert [record["axis"] for record in run.costs] == ["width"]
    assert [record["verdict"] for record in run.certificates] == ["lossless"]
    assert run.described() == (
        "2026-01-02, 2 cores of a processor, Python 3.11.7, specdec 0.1.0, torch 2.13.0, transformers 5.23.0"
    )


def test_a_journal_is_a_run_as_far_as_it_goes(tmp_path: Path) -> None:
    """Of a run that was killed: its last line is cut off, and the ceiling is no cell."""
    configuration = {"versions": {"torch": "2.11.0"}, "cpu_model": "a processor", "cpu_count": 16, "gammas": [2]}
    journal = Journal.open(tmp_path / "run.jsonl", configuration, resume=False)
    journal.append("roofline", Entry({"bandwidths": [1.0]}, []))
    journal.append("cost-width-1", Entry(sized("width", 1, 0.5), [0.5, 0.6]))
    journal.append("specdec-ngram", Entry(decoded("ngram", 2), [1.0]))
    journal.close()
    with (tmp_path / "run.jsonl").open("a") as stream:
        stream.write('{"cell": "cut o')
    run = results.read(tmp_path / "run.jsonl")
    assert [record["axis"] for record in run.costs] == ["width"]
    assert [record["per_round_s"] for record in run.records] == [[1.0], [0.5, 0.6]]
    assert run.configuration == configuration
    assert run.described().endswith(", 16 cores of a processor, Python ?, torch 2.11.0")


def test_an_audit_is_named_by_its_cell(tmp_path: Path) -> None:
    run = document([audited("lossless"), audited("lossless")])
    for benchmark, workload in zip(run["benchmarks"], ("a", "b"), strict=True):
        benchmark["params"] = {"workload": workload, "batch_size": 1, "engine": "not this"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    read = campaigns.read_all([tmp_path / "run.json"])[0]
    names = [results.cell_id(record) for record in read.certificates]
    assert names == ["equivalence-specdec-tiny-ngram-2-a-1", "equivalence-specdec-tiny-ngram-2-b-1"]


def test_unknown_fields_stay_and_missing_ones_are_none(tmp_path: Path) -> None:
    old = decoded("ngram", 2, tree_width=[1, 2], branching=3)
    del old["prompt_format"], old["predicted_speedup"], old["placement"]
    (record,) = results.read(write(tmp_path / "run.json", [old])).cells
    assert (record["tree_width"], record["branching"]) == ([1, 2], 3)
    assert (record["prompt_format"], record["placement"], record["predicted_speedup"]) == ("instruct", "same", None)


ESCAPES = "\x1b]0;gone\x07\x1b[2J\r\u202e\u2028\x9b\ud800"


def test_no_control_characters_reach_the_terminal(tmp_path: Path) -> None:
    """Nor the Markdown, page or CSV: control characters are shown as escapes."""
    record = decoded("ngram", 2, device=f"cpu{ESCAPES}", **{f"field{ESCAPES}": ESCAPES})
    machine = MACHINE | {"cpu_model": f"CPU{ESCAPES}"}
    changes = {"machine_info": machine, "command": f"pytest{ESCAPES}", "datetime": f"2026{ESCAPES}"}
    run = results.read(write(tmp_path / f"run{ESCAPES[:4]}.json", [record, decoded("ngram", 4)], **changes))
    document = rendering.document([run])
    texts = (rendering.text(run), markdown.render(document), page.render(document), csv_text.render([run]))
    assert all(not printable.UNPRINTABLE.search(text.replace("\n", "").replace("\t", "")) for text in texts)
    assert "\\x1b" in texts[0]


def test_a_journal_is_made_harmless_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with closing(Journal.open(path, {"cpu_model": ESCAPES}, resume=False)) as journal:
        journal.append("a", Entry(decoded("ngram", 2, device=ESCAPES), [0.1]))
    assert not printable.UNPRINTABLE.search(rendering.text(results.read(path)).replace("\n", ""))


def test_no_cell_of_the_csv_is_a_formula(tmp_path: Path) -> None:
    formulas = {"device": "=cmd|' /C calc'!A0", "dtype": "+1", "draft": "@x", "=field": "-2+3"}
    run = results.read(write(tmp_path / "=run.json", [decoded("ngram", 2, **formulas)]))
    (row,) = csv.DictReader(io.StringIO(csv_text.render([run])))
    assert (row["run"], row["device"], row["dtype"]) == ("'=run", "'=cmd|' /C calc'!A0", "'+1")
    assert (row["draft"], row["'=field"]) == ("'@x", "'-2+3")
    assert not any(cell.startswith(("=", "+", "@")) for cell in (*row, *row.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": "1/1000000000"}, "must be of shard I/N with 1 <= I <= N <= 10000, and is of 1/1000000000"),
        ({"shard": "0/0"}, "must be of shard I/N"),
        ({"shard": [3, 2]}, "must be of shard I/N"),
        ({"shard": "1/2/3"}, "is invalid"),
        ({"cells_of_shards": [int("9" * 400)]}, "an integer must be below 2\\*\\*64"),
        ({"cells_of_shards": [None]}, "is invalid"),
        ({"schema_version": int("9" * 400)}, "an integer must be below 2\\*\\*64"),
        ({"cells_of_shards": [1e400]}, "is invalid"),
    ],
)
def test_numbers_that_no_run_has_are_refused_at_once(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        results.read(write(tmp_path / "run.json", [decoded("ngram", 2)], **changes))


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "baselines").glob("*.json")), ids=lambda path: path.stem)
def test_committed_runs_can_be_read(path: Path) -> None:
    (run,) = campaigns.read_all([path])
    assert len(run.records) == len(json.loads(path.read_text())["benchmarks"])


LACKING = {name: value for name, value in decoded("ngram", 2).items() if name not in ("engine", "latency_s")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be written by `pytest bench/ --benchmark-json`; JSONDecodeError"),
        ("null", "must be written by `pytest bench/ --benchmark-json`; TypeError"),
        ('{"benchmarks": {}, "machine_info": {}}', "must have at least one finished cell, and has none; see why"),
        (document([]), "must have at least one finished cell"),
        (document([decoded("ngram", 2)], schema_version=0), "schema_version=1, and has 0; measure again"),
        (document([decoded("ngram", 2)], schema_version=2), "schema_version=1, and has 2; use a newer specdec"),
        (document([decoded("ngram", 2)], schema_version="x"), "schema_version=1, and has x; measure again"),
        (document([LACKING]), "must be whole, but cell cell-0 lacks engine, latency_s; measure it again"),
        (document([decoded("ngram", 2, speedup="fast")]), "in cell cell-0 speedup=fast is no number; measure it"),
        (document([decoded("ngram", 2, ttft_s=float("nan"))]), "in cell cell-0 ttft_s=nan is no number"),
        (document([decoded("ngram", 2)], shard="2"), "must be written by `pytest bench/"),
        (document([[1]]), "must be written by `pytest bench/"),
        ("[" * 100_000, "must be written by `pytest bench/ --benchmark-json`; RecursionError"),
    ],
)
def test_errors_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is looked at below
        results.read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"run\.json must be written by .*UnicodeDecodeError"):
        results.read(tmp_path / "run.json")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a file that can be read \(Is a directory\); check the path"):
        results.read(tmp_path)


def shard(folder: Path, index: int, gammas: list[int], number: int = 2, **options: Any) -> Path:
    configuration = {"seed": 0, "engines": ["specdec"], **options}
    records = [decoded("ngram", gamma) for gamma in gammas]
    path = folder / f"run-{index}-of-{number}.json"
    return write(path, records, configuration=configuration, shard=f"{index}/{number}")


def test_shards_are_one_run(tmp_path: Path) -> None:
    (run,) = campaigns.read_all([shard(tmp_path, 2, [1, 3]), shard(tmp_path, 1, [2])])
    assert [record["gamma"] for record in run.cells] == [1, 2, 3]
    assert (run.name, run.missing_shards) == ("run, 2 shards", ())


def test_the_shard_may_be_in_the_configuration(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / f"{index}.json", [decoded("ngram", index)], configuration={"shard": [index, 2]})
        for index in (1, 2)
    ]
    (run,) = campaigns.read_all(parts)
    assert [record["gamma"] for record in run.cells] == [1, 2]


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    (run,) = campaigns.read_all([shard(tmp_path, 1, [1], 3), shard(tmp_path, 3, [2], 3)])
    assert run.missing_shards == (2,)
    (run,) = campaigns.read_all([shard(tmp_path, 2, [1], 3)])
    assert run.missing_shards == (1, 3)
    assert run.shortage == "Not the whole campaign: parts 1, 3 of it are missing"


def test_a_shard_without_cells_is_not_missed(tmp_path: Path) -> None:
    """It writes no file."""
    options = {"configuration": {}, "shard": "1/3", "cells_of_shards": [1, 0, 2]}
    (run,) = campaigns.read_all([write(tmp_path / "run.json", [decoded("ngram", 1)], **options)])
    assert run.missing_shards == (3,)


def test_cells_of_shards_stand_as_one_run_would_have_them(tmp_path: Path) -> None:
    cells = [decoded("ngram", "auto"), decoded("ngram", 4, workload="b"), decoded("eagle", 2)]
    others = [decoded("ngram", 2, workload="b"), decoded("ngram", 8), decoded("autoregressive")]
    same = {"configuration": {"seed": 0}}
    parts = [write(tmp_path / f"{name}.json", some, **same) for name, some in (("a", cells), ("b", others))]
    (run,) = campaigns.read_all(parts)
    assert [(cell["workload"], cell["method"], cell["gamma"]) for cell in run.cells] == [
        ("smoke", "autoregressive", 0),
        ("smoke", "ngram", 8),
        ("smoke", "ngram", "auto"),
        ("smoke", "eagle", 2),
        ("b", "ngram", 2),
        ("b", "ngram", 4),
    ]


def test_a_cell_of_two_shards_is_named(tmp_path: Path) -> None:
    message = (
        "cell specdec-tiny-ngram-2-same-smoke-1 must be in one file of a campaign, and is in both run-1-of-2 and "
        "run-2-of-2; leave one of them out, or give each shard once"
    )
    with pytest.raises(ValueError, match=message):
        campaigns.read_all([shard(tmp_path, 1, [1, 2]), shard(tmp_path, 2, [2])])


def test_shards_of_other_configurations_are_named(tmp_path: Path) -> None:
    message = "run-1-of-2 and run-2-of-2 must be shards of one campaign, but seed was 0 and is 1; measure one again"
    with pytest.raises(ValueError, match=message):
        campaigns.read_all([shard(tmp_path, 1, [1]), shard(tmp_path, 2, [2], seed=1)])


def test_parts_of_a_run_without_a_cell_in_common_are_one(tmp_path: Path) -> None:
    same = {"configuration": {"seed": 0}}
    first = write(tmp_path / "first.json", [decoded("ngram", 1)], **same)
    second = write(tmp_path / "second.json", [decoded("ngram", 2)], **same)
    assert len(campaigns.read_all([first, second])) == 1
    other = write(tmp_path / "other.json", [decoded("ngram", 3)], configuration={"seed": 1})
    again = write(tmp_path / "again.json", [decoded("ngram", 1)], **same)
    silent = write(tmp_path / "silent.json", [decoded("ngram", 4)])
    for another in (other, again, silent):
        assert len(campaigns.read_all([first, another])) == 2
