"""Pictures: what they show is looked at as data, and that it is drawn on matplotlib's own objects."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import loaded

from bench.records import phases, results, sweeps
from bench.records.results import complete
from bench.report import rendering
from bench.report.charts import cost, drawing
from bench.report.charts.cost import Bars, Chart, Line, Rows, Series

ROOT = Path(__file__).parents[3]
BASELINE = ROOT / "bench" / "baselines" / "engines-cpu.json"


def size(axis: str, number: int, median_s: float, roofline_s: float | None = None, tokens: int = 1) -> dict[str, Any]:
    record = {"axis": axis, "size": number, "median_s": median_s, "roofline_s": roofline_s, "tokens": tokens}
    return complete(record) | {"schema_version": 1, "pair": "tiny", "dtype": "float32", "device": "cpu"}


def shares(axis: str, rows: int, *parts: float) -> dict[str, Any]:
    method, temperature = phases.parse(axis)
    named = {f"{phase}_share": part for phase, part in zip(phases.PHASES, parts, strict=True)}
    return size(axis, rows, 1.0) | {"method": method, "temperature": temperature, "step_s": 0.0125} | named


def cell(method: str, gamma: int | str, speedup: float, **changes: Any) -> dict[str, Any]:
    """Ten steps that draft all tokens, each for 0.1 plain steps, verified for one."""
    record = complete({"engine": "specdec", "pair": "tiny"}) | {
        "placement": "same",
        "workload": "spec_bench:rag",
        "batch_size": 2,
    }
    record |= {"dtype": "float32", "device": "cpu", "temperature": 1.0, "method": method, "gamma": gamma}
    num_drafted = 10 * (gamma if isinstance(gamma, int) else 3)
    record |= {"num_steps": 10, "num_drafted": num_drafted, "cost_ratio": 0.1, "step_cost_ratio": 1.0}
    record |= {"speedup": speedup, "speedup_low": speedup - 0.2, "speedup_high": speedup + 0.3}
    return record | {"acceptance_rate_at": [0.5, 0.25, 0.125, 0.0][: num_drafted // 10]} | changes


def test_costs_are_shown_in_milliseconds_beside_what_reading_takes() -> None:
    records = [size("width", 1, 0.004, 0.002), size("width", 2, 0.006, 0.0025)]
    (chart,) = cost.pictures(records)
    assert isinstance(chart, Chart)
    assert (chart.name, chart.x_label, chart.y_label) == ("width", "tokens scored in a step", "ms per step")
    measured, least = chart.series
    assert measured == Series("one row", (1.0, 2.0), (4.0, 6.0))
    assert least == Series("one row: reading weights and cache alone", (1.0, 2.0), (2.0, 2.5), dashed=True)


def test_batches_are_shown_as_throughput_and_beside_the_head() -> None:
    records = [size("batch", 4, 0.002, 0.001, 4), size("batch-of-5", 4, 0.005, 0.002, 20), size("head", 4, 0.001, 1e-4)]
    batch, head = cost.pictures(records)
    assert isinstance(batch, Chart)
    assert [(line.y, line.kind, line.dashed) for line in batch.series] == [
        ((2000.0,), 0, False),
        ((4000.0,), 0, True),
        ((4000.0,), 1, False),
        ((10000.0,), 1, True),
    ]
    assert isinstance(head, Chart)
    assert [(line.label, line.y) for line in head.series if not line.dashed] == [("target", (2.0,)), ("head", (1.0,))]


def test_lookup_is_shown_per_token() -> None:
    (chart,) = cost.pictures([size("ngram", 1000, 0.002, tokens=1000), size("ngram", 10_000, 0.03, tokens=10_000)])
    assert isinstance(chart, Chart)
    assert chart.y_label == "µs per token"
    assert chart.series[0].y == pytest.approx((2.0, 3.0))


def test_every_axis_of_the_sweep_is_in_a_picture() -> None:
    shown = {axis for _, _, _, axes in cost._CHARTS.values() for axis in axes} | set(phases.SWEEPS)
    assert shown == set(sweeps.SWEEPS)


def test_phases_are_stacked_bars() -> None:
    records = [
        shares("phases-eagle-greedy", 1, 0.2, 0.7, 0.06, 0.04),
        shares("phases-eagle-sampled", 8, 0.1, 0.8, 0.1, 0),
    ]
    (bars,) = cost.pictures(records)
    assert isinstance(bars, Bars)
    assert bars.bars == (
        ("eagle, greedy, 1 row", "12.5 ms", (0.2, 0.7, 0.06, 0.04)),
        ("eagle, temperature 1, 8 rows", "12.5 ms", (0.1, 0.8, 0.1, 0)),
    )
    (axes,) = drawing.draw(bars).axes
    widths = [[round(patch.get_width(), 9) for patch in part] for part in axes.containers]
    assert widths == [[0.2, 0.1], [0.7, 0.8], [0.06, 0.1], [0.04, 0]]
    starts = [[round(patch.get_x(), 9) for patch in part] for part in axes.containers]
    assert starts == [[0, 0], [0.2, 0.1], [0.9, 0.9], [0.96, 1.0]]


def test_speedups_are_shown_with_their_intervals_and_the_prediction() -> None:
    plain = cell("autoregressive", 0, 1.0) | {"speedup": None, "step_cost_ratio": None}
    cells = [plain, cell("eagle", 4, 1.25), cell("eagle", "auto", 1.5), cell("eagle", 2, 1.375)]
    cells[2]["predicted_speedup"] = 1.75
    overview, chart = cost.sections(cells)["speedup"]
    (acceptance,) = cost.sections(cells)["acceptance"]
    assert isinstance(overview, Rows)
    assert overview.lines == (Line("specdec eagle, gamma auto", 1.5, 1.3, 1.8, 0, 1.75),)
    assert isinstance(chart, Chart)
    assert chart.name == "speedup-specdec-tiny-spec_bench-rag-batch-2"  # can be a file's name
    assert chart.title == (
        "Speed-up over plain decoding: specdec\ntiny, float32 on cpu, spec_bench:rag, batch size 2, temperature 1"
    )
    assert chart.ticks == ((0.0, "0"), (2.0, "2"), (4.0, "4"), (5.0, "auto"))
    plain_decoding, measured, predicted = chart.series
    assert (plain_decoding.x, plain_decoding.y) == ((0.0, 5.0), (1.0, 1.0))
    assert (measured.x, measured.y) == ((2.0, 4.0, 5.0), (1.375, 1.25, 1.5))
    assert measured.num_loose == 1  # "auto" is no number
    assert measured.low == pytest.approx((1.175, 1.05, 1.3))
    assert measured.high == pytest.approx((1.675, 1.55, 1.8))
    assert predicted.dashed
    assert predicted.y == pytest.approx((1, 1.5 / 1.1, 1.75 / 1.2, 1.875 / 1.3, 1.875 / 1.4))
    assert isinstance(acceptance, Chart)
    assert acceptance.series == (Series("eagle, gamma 4", (1.0, 2.0, 3.0, 4.0), (0.5, 0.25, 0.125, 0.0)),)


def test_engines_that_tell_less_have_fewer_lines() -> None:
    """One round gives no interval, no phase times no prediction, and no counts no acceptance."""
    silent = {"speedup_low": None, "speedup_high": None, "step_cost_ratio": None, "acceptance_rate_at": None}
    overview, chart = cost.pictures([cell("ngram", 2, 1.5, **silent)])
    assert isinstance(overview, Rows)
    assert (overview.lines[0].low, overview.lines[0].high, overview.lines[0].predicted) == (1.5, 1.5, None)
    assert isinstance(chart, Chart)
    assert [series.label for series in chart.series] == ["plain decoding", "ngram"]
    assert chart.series[1].low == chart.series[1].high == chart.series[1].y


def test_numbers_are_shown_against_gamma_in_readable_units() -> None:
    told = {"acceptance_rate": 0.5, "acceptance_rate_low": 0.25, "acceptance_rate_high": 0.75, "system_efficiency": 0.6}
    told |= {"draft_time_per_token_s": 0.002, "scoring_time_s": 0.5, "verification_time_s": 0.05, "num_tokens": 100}
    told |= {"latency_s": 1.5, "energy_per_token_j": 2.0, "energy_per_accepted_token_j": 5.0, "throughput_tok_s": 64.0}
    plain = {"scoring_time_s": 1.0, "verification_time_s": 0.1, "num_tokens": 100, "latency_s": 3.0}
    plain |= {"energy_per_token_j": 4.0, "throughput_tok_s": 32.0, "speedup": None, "acceptance_rate_at": None}
    cells = [cell("autoregressive", 0, 1.0) | plain, cell("eagle", 2, 1.5, **told), cell("eagle", "auto", 2.0, **told)]
    sections = cost.sections(cells)
    measured = {
        chart.name.partition("-specdec")[0]: chart.series[-1]
        for name in sections
        for chart in sections[name][-8:]
        if isinstance(chart, Chart)
    }
    expected = {"acceptance-rate": 0.5, "system-efficiency": 0.6, "draft-time": 2.0, "scoring-time": 5.0}
    expected |= {"verification-time": 0.5, "latency": 1.5, "energy-per-token": 2.0, "energy-per-accepted": 5.0}
    assert {name: measured[name].y for name in expected} == {name: (y, y) for name, y in expected.items()}
    assert all(measured[name].x == (2.0, 3.0) for name in expected)
    assert (measured["acceptance-rate"].low, measured["acceptance-rate"].high) == ((0.25, 0.25), (0.75, 0.75))
    across = {"scoring-time": 10.0, "verification-time": 1.0, "latency": 3.0, "energy-per-token": 4.0}
    charts = {chart.name.partition("-specdec")[0]: chart for name in sections for chart in sections[name]}
    for name, y in across.items():
        assert charts[name].series[0] == Series("plain decoding", (0.0, 3.0), (y, y), -1, dashed=True)
    assert charts["throughput"].series == (
        Series("plain decoding", (3.0,), (32.0,), -1, line=False, names=("gamma 0, batch size 2",)),
        Series(
            "eagle",
            (1.5, 1.5),
            (64.0, 64.0),
            0,
            line=False,
            names=("gamma 2, batch size 2", "gamma auto, batch size 2"),
        ),
    )


def test_batch_sizes_are_joined_where_there_are_several() -> None:
    told = {"throughput_tok_s": 10.0, "latency_s": 1.0}
    cells = [cell("eagle", 2, 1.5, **told), cell("eagle", 2, 1.5, **told | {"latency_s": 4.0, "batch_size": 8})]
    (chart,) = cost.sections(cells)["throughput"]
    names = ("gamma 2, batch size 2", "gamma 2, batch size 8")
    assert chart.series == (Series("eagle", (1.0, 4.0), (10.0, 10.0), 0, names=names),)


def test_gammas_in_words_stand_behind_the_numbers() -> None:
    cells = [cell("ngram", gamma, 1.5) for gamma in (4, "auto", 2)] + [cell("ngram", "2x2", 1.5, step_cost_ratio=None)]
    _, chart = cost.sections(cells)["speedup"]
    assert isinstance(chart, Chart)
    assert chart.ticks == ((0.0, "0"), (2.0, "2"), (4.0, "4"), (5.0, "auto"), (6.0, "2x2"))
    (measured,) = [series for series in chart.series if not series.dashed]
    assert (measured.x, measured.num_loose) == ((2.0, 4.0, 5.0, 6.0), 2)


def test_a_draft_of_nothing_is_not_called_efficient() -> None:
    idle = cell("eagle", "auto", 1.0, num_drafted=0, system_efficiency=1.0, acceptance_rate_at=[])
    assert cost.sections([idle])["acceptance"] == []


def test_a_method_has_one_colour_in_all_pictures() -> None:
    cells = [cell("ngram", 2, 1.5), cell("eagle", 2, 1.5), cell("eagle", 2, 1.2, engine="vllm")]
    charts = [chart for chart in cost.sections(cells)["speedup"] if isinstance(chart, Chart)]
    kinds = [{series.label: series.kind for series in chart.series if not series.dashed} for chart in charts]
    assert kinds == [{"ngram": 0, "eagle": 1}, {"eagle": 1}]


def test_engines_have_the_same_axis() -> None:
    cells = [cell("eagle", 2, 1.5), cell("eagle", 2, 9.0, engine="vllm")]
    charts = [chart for chart in cost.sections(cells)["speedup"] if isinstance(chart, Chart)]
    assert [chart.y_most for chart in charts] == [9.3, 9.3]


def test_load_is_shown_by_rate_with_the_tail_dashed() -> None:
    """Twice as fast as plain decoding at one request a second, half as fast at two."""
    loads = [
        *(loaded(2.0, "ngram", 4, 8.0), loaded(1.0, "ngram", 4, 1.0)),
        *(loaded(1.0, "autoregressive", 0, 2.0), loaded(2.0, "autoregressive", 0, 4.0)),
    ]
    charts = cost.sections([*map(complete, loads)])["load"]
    pays, latency, ttft, inter_token, tokens, goodput, crossed = charts
    assert pays.title.startswith("Up to which rate it pays: specdec\n")
    assert [(line.label, line.x, line.y) for line in pays.series] == [
        ("plain decoding", (1.0, 2.0), (1.0, 1.0)),
        ("ngram, gamma 4", (1.0, 2.0), (2.0, 0.5)),
    ]
    assert [(line.label, line.x, line.y, line.dashed) for line in latency.series] == [
        ("ngram, gamma 4: 50 % of requests", (1.0, 2.0), (1.0, 8.0), False),
        ("plain decoding: 50 % of requests", (1.0, 2.0), (2.0, 4.0), False),
        ("ngram, gamma 4: 95 % of requests", (1.0, 2.0), (2.0, 16.0), True),
        ("plain decoding: 95 % of requests", (1.0, 2.0), (4.0, 8.0), True),
    ]
    assert [chart.series[0].y for chart in (ttft, inter_token)] == [(0.5, 4.0), (0.125, 1.0)]
    assert [line.y for line in tokens.series] == [(8.0, 16.0), (8.0, 16.0)]
    assert [line.y for line in goodput.series] == [(0.5, 1.0), (0.5, 1.0)]
    assert [(line.x, line.y) for line in crossed.series] == [((1.0, 8.0), (8.0, 16.0)), ((2.0, 4.0), (8.0, 16.0))]


def test_an_unknown_axis_has_a_picture_too() -> None:
    (chart,) = cost.pictures([size("depth of tree", 2, 0.003), size("depth of tree", 4, 0.005)])
    assert isinstance(chart, Chart)
    assert (chart.name, chart.series[0].y) == ("depth-of-tree", (3.0, 5.0))


def test_rows_are_drawn() -> None:
    rows = Rows("name", "title", "speed-up", (Line("a", 1.5, 1.25, 2.0, 0, 1.75), Line("b", 0.5, 0.5, 0.5, 1)))
    (axes,) = drawing.draw(rows).axes
    values = [container.lines[0].get_xdata().tolist() for container in axes.containers]
    ends = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in axes.containers]
    assert values == [[1.5], [0.5]]
    assert ends == [[1.25, 2.0], [0.5, 0.5]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    (predicted,) = [line for line in axes.lines if line.get_label().startswith("predicted")]
    assert predicted.get_xdata() == [1.75]


def test_what_is_drawn_is_the_data() -> None:
    series = (
        Series("a", (1.0, 2.0), (3.0, 4.0), 0, (2.5, 3.0), (3.5, 6.0)),
        Series("b", (1.0, 2.0), (1.0, 1.5), 1, dashed=True),
    )
    ticks = ((1.0, "one"), (2.0, "auto"))
    figure = drawing.draw(Chart("name", "title", "gamma", "speed-up", series, ticks=ticks), "a machine")
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert [list(each) for each in bars.lines[0].get_data()] == [[1.0, 2.0], [3.0, 4.0]]
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [[2.5, 3.5], [3.0, 6.0]]
    (dashed,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [list(each) for each in dashed.get_data()] == [[1.0, 2.0], [1.0, 1.5]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["one", "auto"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == ("gamma", "speed-up", "title")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert legend.get_title().get_text() == "a machine"


def test_sizes_are_the_ticks_and_of_many_the_powers_of_two() -> None:
    few, many = (
        Chart("", "", "", "", (Series("", x, x),), True) for x in ((3000.0, 49152.0), tuple(map(float, range(1, 13))))
    )
    assert drawing._ticks(few) == [(3000.0, "3,000"), (49152.0, "49,152")]
    assert [label for _, label in drawing._ticks(many)] == ["1", "2", "4", "8"]


def test_a_run_is_drawn_into_files(tmp_path: Path) -> None:
    """A committed one."""
    run = results.read(BASELINE.with_name("drafts-heldout-sampled.json"))
    paths = rendering.draw(run, tmp_path / "new")
    kinds = ["overview", *(f"{kind}-specdec" for kind in ("speedup", "system-efficiency", "acceptance", "draft-time"))]
    kinds += [f"{kind}-specdec" for kind in ("scoring-time", "verification-time", "latency", "throughput")]
    kinds.insert(2, "acceptance-rate-specdec")
    names = [f"{kind}-smollm2-135m-held_out" + ("-batch-1" if "throughput" not in kind else "") for kind in kinds]
    assert [path.name for path in paths] == [f"drafts-heldout-sampled-{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a file that can be read (No such file or directory); check the path"),
        ("no JSON", "must be written by `pytest bench/ --benchmark-json`; JSONDecodeError"),
        ('{"benchmarks": [{"name": "another project"}]}', "must be written by `pytest bench/"),
        ("[1, 2]", "must be written by `pytest bench/"),
    ],
)
def test_what_is_no_result_is_refused(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run.json"
    if content is not None:
        run.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--plots", str(tmp_path / "plots")])
    with pytest.raises(SystemExit) as left:
        rendering.main()
    assert left.value.code == 2
    assert f"{run} {message}" in capsys.readouterr().err
    assert not (tmp_path / "plots").exists()


def test_a_missing_matplotlib_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bench.report.charts.drawing")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delattr("bench.report.charts.drawing")
    with pytest.raises(ValueError, match=r"plots=.* needs matplotlib .*; pip install matplotlib"):
        rendering.draw(results.read(BASELINE), tmp_path)


def test_tables_need_no_matplotlib() -> None:
    code = (
        f"import sys; from bench.report.rendering import render; render(__import__('pathlib').Path({str(BASELINE)!r}))"
    )
    command = [sys.executable, "-c", f"{code}; assert 'matplotlib' not in sys.modules"]
    subprocess.run(command, check=True, cwd=ROOT)


def test_the_printed_run_tells_what_was_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    machine = {"gpus": [], "cpu_count": 2, "cpu_model": "CPU", "versions": {}, "python_version": "3"}
    width = size("width", 1, 0.004, 0.002) | {"read_bandwidth": 3e10, "roofline_share": 0.5}
    run = {"machine_info": machine, "datetime": "2026-01-01T00", "benchmarks": [{"extra_info": width}]}
    (tmp_path / "cost.json").write_text(json.dumps(run | {"schema_version": 1}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "cost.json"), "--plots", str(tmp_path)])
    rendering.main()
    assert f"drawn: {tmp_path / 'cost-width.png'}" in capsys.readouterr().out
    assert (tmp_path / "cost-width.png").is_file()
