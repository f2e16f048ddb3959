"""Reports as CSV and Markdown, and the command that writes them."""

from __future__ import annotations

import csv
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import audited, decoded, loaded, row_of, sized, write

from bench.records import fields, results
from bench.report import markdown, rendering, summary
from bench.report.exports import csv_text

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"

ROOT = Path(__file__).parents[3]
HOSTILE = '<script>alert("x")</script> | a `b` *c* [d](http://e)\n& "f"'


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def run_of(folder: Path, *records: Any, name: str = "run", **changes: Any) -> Any:
    return results.read(write(folder / f"{name}.json", records, **changes))


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    rendering.main()


def test_csv_has_every_scalar_of_every_record(tmp_path: Path) -> None:
    records = [decoded("ngram", "auto", note=HOSTILE, branching=3), sized("width", 4, 0.1 + 0.2), audited("lossy")]
    rows = rows_of(csv_text.render([run_of(tmp_path, *records)]))
    assert [(row["run"], row["kind"]) for row in rows] == [("run", "cell"), ("run", "cost"), ("run", "certificate")]
    for record, row in zip(records, rows, strict=True):
        scalars = {name: value for name, value in record.items() if not isinstance(value, list)}
        assert {name: row[name] for name in scalars} == {
            name: "" if value is None else str(value) for name, value in scalars.items()
        }
    assert float(rows[1]["median_s"]) == 0.1 + 0.2  # to the last digit
    assert "per_prompt_latency_s" not in rows[0]


def test_columns_have_the_order_of_the_glossary_for_any_record(tmp_path: Path) -> None:
    one = csv_text.render([run_of(tmp_path, decoded("ngram", 2))]).splitlines()[0].split(",")
    other = csv_text.render([run_of(tmp_path, decoded("autoregressive", zebra=1, apple=2))]).splitlines()[0].split(",")
    assert one == ["run", "kind", *(each.name for each in fields.FIELDS.values() if each.type not in (list, dict))]
    assert other == [*one, "apple", "zebra"]


def test_runs_stand_below_each_other(tmp_path: Path) -> None:
    runs = [run_of(tmp_path, decoded("ngram", gamma), name=f"run{gamma}") for gamma in (1, 2)]
    assert [(row["run"], row["gamma"]) for row in rows_of(csv_text.render(runs))] == [("run1", "1"), ("run2", "2")]


def test_every_field_of_the_committed_runs_has_a_sentence() -> None:
    folder = Path(__file__).parents[3] / "bench" / "baselines"
    for path in folder.glob("*.json"):
        for record in results.read(path).records:
            assert set(fields.scalars(record)) <= set(fields.FIELDS)
    for field in fields.FIELDS.values():
        assert re.fullmatch(r"[A-Z].*\.", field.meaning), field


def test_each_meaning_stands_alone() -> None:
    """Readers look one field up: no sentence refers to that of the field before."""
    leaning = re.compile(r"^(So|Those|The same|Lower end of its|Upper end of its)\b|\bof them\b|the same time")
    assert [name for name, field in fields.FIELDS.items() if leaning.search(field.meaning)] == []


def test_runs_are_grouped_by_method_with_costs_among_them() -> None:
    """README's own command, over committed files of both kinds."""
    files = [str(BASELINES / name) for name in ("engines-float32-cpu.json", "slots-cpu.json")]
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *files, "--columns=median"]
    done = subprocess.run(
        [*command, "--group-by=param:method,param:gamma"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "method=ngram" in done.stdout


def test_a_field_of_another_version_is_named_as_such() -> None:
    assert fields.field("branching").meaning == "A field that this version does not know."
    assert fields.field("branching").title == "branching"


def markdown_rows(text: str) -> list[list[str]]:
    """Cells of all tables, without the escapes."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[re.sub(r"\\(.)", r"\1", cell) for cell in re.split(r" (?<!\\)\| ", line[2:-2])] for line in lines]


def test_markdown_has_the_tables(tmp_path: Path) -> None:
    cells = decoded("ngram", 2, 3 * [1, 2]), decoded("autoregressive")
    text = markdown.render(rendering.document([run_of(tmp_path, *cells)]))
    rows = markdown_rows(text)
    assert ["specdec", "ngram", "2", "6.7", "2.00 [1.50, 2.50]", "6 of 6", "50.0% [25.0%, 75.0%]", "3.00"] in rows
    assert "- **2.00×** specdec with ngram, gamma 2, over its plain decoding, 95 % interval 1.50 to 2.50" in text
    width: dict[int, int] = {}
    for number, line in enumerate(text.splitlines()):
        if line.startswith("|"):  # all rows of a table have as many cells
            width[number] = len(re.findall(r"(?<!\\)\|", line))
            assert width.get(number - 1, width[number]) == width[number], line


def test_markdown_escapes_the_values_of_a_record(tmp_path: Path) -> None:
    run = run_of(tmp_path, decoded("ngram", 2, workload=HOSTILE), decoded("ngram", 2, workload="other"))
    text = markdown.render(rendering.document([run]))
    assert "<script" not in text.replace("\\<script", "")
    assert [" ".join(HOSTILE.split()), "specdec", "ngram", "2"] in [row[:4] for row in markdown_rows(text)]


def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs = [write(tmp_path / f"{name}.json", [decoded("ngram", 2), sized("width", 1, 0.5)]) for name in "ab"]
    targets = {option: tmp_path / f"out.{option}" for option in ("html", "markdown", "csv")}
    command(monkeypatch, *runs, *(part for option, path in targets.items() for part in (f"--{option}", path)))
    printed = capsys.readouterr().out
    assert [f"written: {path}" for path in targets.values()] == printed.splitlines()[-3:]
    assert "What changed: b against a" in printed
    assert "     2  of 2 cells: no difference seen" in printed
    assert targets["html"].read_text().startswith("<!DOCTYPE html>")
    assert targets["markdown"].read_text().startswith("# Speculative decoding")
    assert len(rows_of(targets["csv"].read_text())) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.json", "out.html", "out.markdown", "out.csv"}
    assert os.stat(targets["csv"]).st_mode & 0o777 == os.stat(runs[0]).st_mode & 0o777


def test_files_are_written_whether_or_not_anybody_reads_the_tables(tmp_path: Path) -> None:
    run, target = write(tmp_path / "a.json", [decoded("ngram", 2)]), tmp_path / "out.csv"
    line = f"set -o pipefail; {sys.executable} -m bench.report {run} --csv {target} | true"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows_of(target.read_text())) == 1


def test_a_missing_part_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command(monkeypatch, write(tmp_path / "a.json", [decoded("ngram", 2)], shard="2/3", configuration={}))
    assert "Not the whole campaign: parts 1, 3 of it are missing" in capsys.readouterr().out


def test_a_run_of_audits_alone_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command(monkeypatch, write(tmp_path / "a.json", [audited("lossy"), audited("lossless", gamma=4)]))
    printed = capsys.readouterr().out.splitlines()
    assert row_of(printed, "2", "token", "lossy")[3:7] == ["(TV", ">", "0.02)", "0.5"]
    assert row_of(printed, "4", "token", "lossless")[3:6] == ["(TV", "<", "0.1)"]


def test_load_is_printed_as_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    loads = [loaded(rate, *arm) for rate in (1.0, 2.5) for arm in (("autoregressive", 0, 2.0), ("ngram", 2, rate))]
    command(monkeypatch, write(tmp_path / "a.json", loads))
    printed = " ".join(capsys.readouterr().out.split())
    assert "ngram 2: limits kept by 50 % up to 2.5, 95 % up to 2.5, 99 % up to no rate; does not pay at 2.5" in printed


@pytest.mark.parametrize("option", ["html", "markdown", "csv"])
def test_a_target_that_cannot_be_written_is_named(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run, target = write(tmp_path / "a.json", [decoded("ngram", 2)]), tmp_path / "missing" / "out"
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, run, f"--{option}", target)
    assert left.value.code == 2
    message = f"{option}={target} must be a writable file (No such file or directory); free space there"
    assert message in capsys.readouterr().err


def test_a_full_disk_keeps_the_existing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "out.html"
    target.write_text("the earlier page")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"html=.*out\.html must be .* \(No space left on device\); free space there"):
        rendering.write("html", target, "a new page")
    assert target.read_text() == "the earlier page"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full: Linux")
def test_a_full_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"csv=/dev/full must be .* \(No space left on device\)"):
        rendering.write("csv", Path("/dev/full"), "text")


def test_a_folder_of_pictures_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    runs = [run_of(tmp_path, decoded("ngram", 2))]
    with pytest.raises(ValueError, match=r"plots=.*file must be a writable folder \(File exists\)"):
        rendering.draw(rendering.document(runs), runs, tmp_path / "file")


def test_unexpected_errors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A list where a name should be."""
    run = write(tmp_path / "a.json", [decoded("ngram", 2, workload=["a"])])
    with pytest.raises(SystemExit):
        command(monkeypatch, run, "--html", tmp_path / "out.html")
    assert f"{run} must be written by `pytest bench/ --benchmark-json`; " in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_runs_with_random_tokens_are_marked() -> None:
    """And their speed-up is not the answer, as that of real prompts is."""
    cells = [decoded("ngram", 2, 6 * [1.0]), decoded("ngram", 2, 6 * [1.0], prompt_source="random tokens")]
    real, marked = (results.of_records([cell]) for cell in cells)
    caution = "Prompts of random tokens: only times are meaningful, not outputs or acceptance."
    assert caution in summary.cautions(marked)
    assert caution not in summary.cautions(real)
    assert "2.00×" in [card.number for card in summary.cards(real)]
    assert "2.00×" not in [card.number for card in summary.cards(marked)]
