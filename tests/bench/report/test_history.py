"""The report on many runs: its tables, its charts and the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import decoded, row_of, write

from bench.records import campaigns
from bench.report import history, rendering
from bench.report.charts.model import Chart
from bench.report.html import page
from bench.report.terminal import chapter as terminal

NUM_NIGHTS, CHANGED_AT = 24, 16


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """Runs by date, of which a cell has half the speed from night 16 on; their names are in another order."""
    folder = tmp_path / "nights"
    folder.mkdir()
    for night in range(NUM_NIGHTS):
        noise = 1.01 if night % 2 else 1.0
        value = (1.0 if night >= CHANGED_AT else 2.0) * noise
        ends = {"speedup_low": 0.9 * value, "speedup_high": 1.1 * value}
        records = [decoded("ngram", 2, speedup=value, **ends), decoded("eagle", 2), decoded("autoregressive")]
        date = f"2026-03-{night + 1:02}T04:00:00+00:00"
        write(folder / f"{99 - night}.json", records, datetime=date, commit_info={"id": f"{night:010}"})
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    rendering.main()


def test_the_terminal_has_the_change_and_its_commit(nights: Path) -> None:
    (chapter,) = history.document(campaigns.read_folder(nights)).chapters
    lines = list(terminal.render(chapter))
    assert lines[0] == "24 runs from 2026-03-01 to 2026-03-24"
    assert "1 of 4  series have a change of level" in lines
    assert "-50.0%  speed-up of specdec ngram 2 since 2026-03-17, the largest such change" in lines
    row = row_of(lines, "specdec", "ngram", "2", "speed-up")
    assert row[4:7] == ["2.010", "1.005", "-50.0%"]
    assert float(row[7]) < 1e-3
    assert "commit 0000000015 to 0000000016" in " ".join(lines)
    assert all(len(line) <= 80 for line in lines)


def test_a_chart_has_the_points_their_levels_and_the_mark(nights: Path) -> None:
    (chapter,) = history.document(campaigns.read_folder(nights)).chapters
    charts = [part for section in chapter.sections for part in section.parts if isinstance(part, Chart)]
    assert [(chart.title.partition("\n")[0], len(chart.marks)) for chart in charts] == [
        ("ngram, gamma 2: specdec", 1),
        ("eagle, gamma 2: specdec", 0),
        ("ngram, gamma 2: specdec", 0),
        ("eagle, gamma 2: specdec", 0),
    ]
    measured, before, after = charts[0].series
    assert charts[0].marks == ((CHANGED_AT - 0.5, "change at the run of 2026-03-17"),)
    assert (measured.y[0], measured.low[0], measured.high[0]) == pytest.approx((2.0, 1.8, 2.2))
    assert (before.x, after.x) == ((-0.4, 15.4), (15.6, 23.4))
    assert (before.y[0], after.y[0]) == (pytest.approx(2 * 1.01**0.5), pytest.approx(1.01**0.5))


def test_a_zoomed_chart_does_not_begin_at_zero(nights: Path) -> None:
    html_page = page.render(history.document(campaigns.read_folder(nights)))
    assert html_page.count("<title>change at the run of 2026-03-17</title>") == 1
    figure = html_page.partition("<figure")[2].partition("</figure>")[0]
    assert ">0<" not in figure
    assert ">0.5<" in figure
    assert "Change at the run of 2026-03-17." in figure


def test_the_command_writes_page_table_and_charts(
    nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "out.html", tmp_path / "out.csv", tmp_path / "plots"]
    command(monkeypatch, "--trends", nights, "--html", files[0], "--csv", files[1], "--plots", files[2])
    assert "Changes of level" in capsys.readouterr().out
    assert "Speculative decoding over time" in files[0].read_text()
    assert len(files[1].read_text().splitlines()) == 1 + 3 * NUM_NIGHTS
    names = sorted(path.name for path in files[2].iterdir())
    assert len(names) == 4
    assert names[0].startswith("trends-trend-mean_acceptance_length-eagle-2")


def test_parts_of_a_night_are_one_run(tmp_path: Path) -> None:
    for night in (1, 2):
        (tmp_path / f"{night}").mkdir()
        for part in (1, 2):
            changes: dict[str, Any] = {"shard": f"{part}/2", "configuration": {"seed": 0}, "cells_of_shards": [1, 1]}
            write(tmp_path / f"{night}" / f"{part}.json", [decoded("ngram", part)], **changes)
    (tmp_path / "notes.txt").write_text("not a run")
    runs = campaigns.read_folder(tmp_path)
    assert [(len(run.cells), run.missing_shards) for run in runs] == [(2, ()), (2, ())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--trends", "{}/none"],
            "none must be a folder with files from `pytest bench/ --benchmark-json`; it has none",
        ),
        ([], "RUN.json or --trends FOLDER must be given, and not both"),
        (["run.json", "--trends", "{}"], "RUN.json or --trends FOLDER must be given, and not both"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, *(each.format(tmp_path) for each in arguments))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


# -- the exit status for continuous integration ----------------------------------------------------------------

PLAIN = {"baseline_per_prompt_latency_s": [2.0, 4.0]}


@pytest.mark.parametrize(("latency_s", "status"), [((1.1, 2.2), 1), ((1.01, 2.02), 0), ((0.5, 1.0), 0)])
def test_a_slower_cell_is_an_exit_status(
    latency_s: tuple[float, ...], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cells = [decoded("ngram", 2), decoded("eagle", 2), decoded("autoregressive")]
    later = [decoded("ngram", 2, latency_s, **PLAIN), *cells[1:]]
    runs = [write(tmp_path / "before.json", cells), write(tmp_path / "after.json", later)]
    found = 0
    try:
        command(monkeypatch, "--fail-on", "slower", *runs)
    except SystemExit as left:
        found = int(str(left.code))
    printed = " ".join(capsys.readouterr().out.split())
    assert found == status
    assert ("slower: specdec ngram 2 on tiny, smoke, batch size 1: 0.909 [0.909, 0.909]" in printed) == bool(status)
    assert f"{status} of 2 cells are more than 2.0% slower; 1 others have nothing beside them in both runs." in printed


def test_a_slower_reference_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs = []
    for name, factor in (("before", 1), ("after", 2)):
        beside = {"reference_per_prompt_latency_s": [factor, 2 * factor], "reference_per_prompt_tokens": [10, 10]}
        runs.append(write(tmp_path / f"{name}.json", [decoded("autoregressive", engine="transformers", **beside)]))
    with pytest.raises(SystemExit):
        command(monkeypatch, "--fail-on", "slower", *runs)
    expected = (
        "slower: specdec autoregressive, beside transformers autoregressive, on tiny, smoke, batch size 1: 0.500 "
    )
    assert expected in " ".join(capsys.readouterr().out.split())


def test_the_rate_and_the_tolerance_are_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    runs = [
        write(tmp_path / "before.json", [decoded("ngram", 2)]),
        write(tmp_path / "after.json", [decoded("ngram", 2, (1.1, 2.2), **PLAIN)]),
    ]
    command(monkeypatch, "--fail-on", "slower", "--tolerance", "0.2", "--false-alarm-rate", "0.05", *runs)
    assert "Without a change this happens in 5.0% of comparisons." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, "--fail-on", "slower", "--tolerance", "0.7", *runs)
    assert left.value.code == 2
    assert "0.7 must be at least 0 and below 0.5" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error_not_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write(tmp_path / f"{name}.json", [decoded("autoregressive")]) for name in ("before", "after")]
    for arguments, message in (
        (runs, "fail_on=slower must have cells that are paired in both runs, but there is none"),
        (runs[:1], "fail_on=slower must have two runs, the earlier and the later, but has 1"),
    ):
        with pytest.raises(SystemExit) as left:
            command(monkeypatch, "--fail-on", "slower", *arguments)
        assert left.value.code == 2
        assert message in capsys.readouterr().err
