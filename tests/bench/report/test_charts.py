"""Charts as data: what they show of the records; `test_svg` tests how they are drawn."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import decoded, loaded, write

from bench.analysis.run_diff import differences
from bench.records import phases, results, sweeps
from bench.records.results import Results, complete
from bench.report import rendering
from bench.report.charts import changes, cost, svg
from bench.report.charts import run as all_charts
from bench.report.charts.model import Bars, Chart, Line, Rows, Series
from bench.report.charts.words import points

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


def test_costs_are_shown_in_milliseconds_with_the_roofline() -> None:
    records = [size("width", 1, 0.004, 0.002), size("width", 2, 0.006, 0.0025)]
    (chart,) = all_charts.pictures(records)
    assert isinstance(chart, Chart)
    assert (chart.name, chart.x_label, chart.y_label) == ("width", "width, tokens scored in a step", "ms per step")
    measured, roofline = chart.series
    assert measured == Series("one sequence", (1.0, 2.0), (4.0, 6.0))
    assert roofline == Series("one sequence: roofline (reading weights and cache)", (1.0, 2.0), (2.0, 2.5), dashed=True)


def test_batches_are_shown_as_throughput_and_and_the_draft_head_by_step_time() -> None:
    records = [size("batch", 4, 0.002, 0.001, 4), size("batch-of-5", 4, 0.005, 0.002, 20), size("head", 4, 0.001, 1e-4)]
    batch, head = all_charts.pictures(records)
    assert isinstance(batch, Chart)
    assert [(line.y, line.kind, line.dashed) for line in batch.series] == [
        ((2000.0,), 0, False),
        ((4000.0,), 0, True),
        ((4000.0,), 1, False),
        ((10000.0,), 1, True),
    ]
    assert isinstance(head, Chart)
    measured = [(line.label, line.y) for line in head.series if not line.dashed]
    assert measured == [("target", (2.0,)), ("draft head", (1.0,))]


def test_lookup_is_shown_per_token() -> None:
    (chart,) = all_charts.pictures(
        [size("ngram", 1000, 0.002, tokens=1000), size("ngram", 10_000, 0.03, tokens=10_000)]
    )
    assert isinstance(chart, Chart)
    assert chart.y_label == "µs per token"
    assert chart.series[0].y == pytest.approx((2.0, 3.0))


def test_every_axis_of_the_sweep_is_in_a_chart() -> None:
    shown = {axis for sweep in cost.SWEEPS.values() for axis in sweep.labels} | set(phases.SWEEPS)
    assert shown == set(sweeps.SWEEPS)


def test_phases_are_stacked_bars() -> None:
    records = [
        shares("phases-eagle-greedy", 1, 0.2, 0.7, 0.06, 0.04),
        shares("phases-eagle-sampled", 8, 0.1, 0.8, 0.1, 0),
    ]
    (bars,) = all_charts.pictures(records)
    assert isinstance(bars, Bars)
    assert bars.bars == (
        ("eagle, greedy, batch size 1", "12.5 ms", (0.2, 0.7, 0.06, 0.04)),
        ("eagle, temperature 1, batch size 8", "12.5 ms", (0.1, 0.8, 0.1, 0)),
    )


def test_speedups_are_shown_with_their_intervals_and_the_prediction() -> None:
    plain = cell("autoregressive", 0, 1.0) | {"speedup": None, "step_cost_ratio": None}
    cells = [plain, cell("eagle", 4, 1.25), cell("eagle", "auto", 1.5), cell("eagle", 2, 1.375)]
    cells[2]["predicted_speedup"] = 1.75
    overview, chart = all_charts.sections(cells)["speedup"]
    (acceptance,) = all_charts.sections(cells)["acceptance"]
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
    assert measured.num_detached == 1  # "auto" is no number
    assert measured.low == pytest.approx((1.175, 1.05, 1.3))
    assert measured.high == pytest.approx((1.675, 1.55, 1.8))
    assert predicted.dashed
    assert predicted.y == pytest.approx((1, 1.5 / 1.1, 1.75 / 1.2, 1.875 / 1.3, 1.875 / 1.4))
    assert isinstance(acceptance, Chart)
    assert acceptance.series == (Series("eagle, gamma 4", (1.0, 2.0, 3.0, 4.0), (0.5, 0.25, 0.125, 0.0)),)


def test_engines_that_tell_less_have_fewer_lines() -> None:
    """One round gives no interval, no phase times no prediction, and no counts no acceptance."""
    silent = {"speedup_low": None, "speedup_high": None, "step_cost_ratio": None, "acceptance_rate_at": None}
    overview, chart = all_charts.pictures([cell("ngram", 2, 1.5, **silent)])
    assert isinstance(overview, Rows)
    assert (overview.lines[0].low, overview.lines[0].high, overview.lines[0].predicted) == (1.5, 1.5, None)
    assert isinstance(chart, Chart)
    assert [series.label for series in chart.series] == ["plain decoding", "ngram"]
    assert chart.series[1].low == chart.series[1].high == chart.series[1].y


def test_numbers_are_shown_against_gamma_in_readable_units() -> None:
    measured = {
        "acceptance_rate": 0.5,
        "acceptance_rate_low": 0.25,
        "acceptance_rate_high": 0.75,
        "system_efficiency": 0.6,
    }
    measured |= {"draft_time_per_token_s": 0.002, "scoring_time_s": 0.5, "verification_time_s": 0.05, "num_tokens": 100}
    measured |= {
        "latency_s": 1.5,
        "energy_per_token_j": 2.0,
        "energy_per_accepted_token_j": 5.0,
        "throughput_tok_s": 64.0,
    }
    plain = {"scoring_time_s": 1.0, "verification_time_s": 0.1, "num_tokens": 100, "latency_s": 3.0}
    plain |= {"energy_per_token_j": 4.0, "throughput_tok_s": 32.0, "speedup": None, "acceptance_rate_at": None}
    cells = [
        cell("autoregressive", 0, 1.0) | plain,
        cell("eagle", 2, 1.5, **measured),
        cell("eagle", "auto", 2.0, **measured),
    ]
    sections = all_charts.sections(cells)
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
    measured = {"throughput_tok_s": 10.0, "latency_s": 1.0}
    cells = [cell("eagle", 2, 1.5, **measured), cell("eagle", 2, 1.5, **measured | {"latency_s": 4.0, "batch_size": 8})]
    (chart,) = all_charts.sections(cells)["throughput"]
    names = ("gamma 2, batch size 2", "gamma 2, batch size 8")
    assert chart.series == (Series("eagle", (1.0, 4.0), (10.0, 10.0), 0, names=names),)


def test_named_gammas_are_sorted_after_numbers() -> None:
    cells = [cell("ngram", gamma, 1.5) for gamma in (4, "auto", 2)] + [cell("ngram", "2x2", 1.5, step_cost_ratio=None)]
    _, chart = all_charts.sections(cells)["speedup"]
    assert isinstance(chart, Chart)
    assert chart.ticks == ((0.0, "0"), (2.0, "2"), (4.0, "4"), (5.0, "auto"), (6.0, "2x2"))
    (measured,) = [series for series in chart.series if not series.dashed]
    assert (measured.x, measured.num_detached) == ((2.0, 4.0, 5.0, 6.0), 2)


def test_a_draft_of_nothing_is_not_called_efficient() -> None:
    idle = cell("eagle", "auto", 1.0, num_drafted=0, system_efficiency=1.0, acceptance_rate_at=[])
    assert all_charts.sections([idle])["acceptance"] == []


def test_a_method_has_one_color_in_all_charts() -> None:
    cells = [cell("ngram", 2, 1.5), cell("eagle", 2, 1.5), cell("eagle", 2, 1.2, engine="vllm")]
    charts = [chart for chart in all_charts.sections(cells)["speedup"] if isinstance(chart, Chart)]
    kinds = [{series.label: series.kind for series in chart.series if not series.dashed} for chart in charts]
    assert kinds == [{"ngram": 0, "eagle": 1}, {"eagle": 1}]


def test_engines_have_the_same_axis() -> None:
    cells = [cell("eagle", 2, 1.5), cell("eagle", 2, 9.0, engine="vllm")]
    charts = [chart for chart in all_charts.sections(cells)["speedup"] if isinstance(chart, Chart)]
    assert [chart.y_max for chart in charts] == [9.3, 9.3]


def test_load_is_shown_by_rate_with_the_tail_dashed() -> None:
    """Twice as fast as plain decoding at one request a second, half as fast at two."""
    loads = [
        *(loaded(2.0, "ngram", 4, 8.0), loaded(1.0, "ngram", 4, 1.0)),
        *(loaded(1.0, "autoregressive", 0, 2.0), loaded(2.0, "autoregressive", 0, 4.0)),
    ]
    charts = all_charts.sections([*map(complete, loads)])["load"]
    speedup, latency, ttft, inter_token, tokens, goodput, crossed = charts
    assert speedup.title.startswith("Speed-up under load: specdec\n")
    assert [(line.label, line.x, line.y) for line in speedup.series] == [
        ("plain decoding", (1.0, 2.0), (1.0, 1.0)),
        ("ngram, gamma 4", (1.0, 2.0), (2.0, 0.5)),
    ]
    assert [(line.label, line.x, line.y, line.dashed) for line in latency.series] == [
        ("ngram, gamma 4: p50", (1.0, 2.0), (1.0, 8.0), False),
        ("plain decoding: p50", (1.0, 2.0), (2.0, 4.0), False),
        ("ngram, gamma 4: p95", (1.0, 2.0), (2.0, 16.0), True),
        ("plain decoding: p95", (1.0, 2.0), (4.0, 8.0), True),
    ]
    assert [chart.series[0].y for chart in (ttft, inter_token)] == [(0.5, 4.0), (0.125, 1.0)]
    assert [line.y for line in tokens.series] == [(8.0, 16.0), (8.0, 16.0)]
    assert [line.y for line in goodput.series] == [(0.5, 1.0), (0.5, 1.0)]
    assert [(line.x, line.y) for line in crossed.series] == [((1.0, 8.0), (8.0, 16.0)), ((2.0, 4.0), (8.0, 16.0))]


def throughputs(user: float, device: float) -> dict[str, float]:
    """A tenth of each on both sides."""
    names = {"user_throughput_tok_s": user, "device_throughput_tok_s": device}
    ends = {"_low": 0.9, "": 1.0, "_high": 1.1}
    return {f"{name}{end}": value * factor for name, value in names.items() for end, factor in ends.items()}


def test_the_pareto_front_has_the_intervals_of_both_axes() -> None:
    """Of four clients each gets less, and the device yields more."""
    loads = [
        loaded(1.0, "autoregressive") | {"rate": None, "concurrency": 4, **throughputs(20.0, 80.0)},
        loaded(1.0, "autoregressive") | {"rate": None, "concurrency": 1, **throughputs(50.0, 50.0)},
    ]
    charts = {chart.name: chart for chart in all_charts.sections([*map(complete, loads)])["load"]}
    pareto = charts["clients-pareto-specdec-tiny-smoke"]
    assert isinstance(pareto, Chart)
    assert pareto.title.startswith("Throughput per device vs. per user, by clients: specdec\n")
    (line,) = pareto.series
    assert (line.x, line.y, line.names) == ((50.0, 20.0), (50.0, 80.0), ("1 clients", "4 clients"))
    assert (line.left, line.right) == (pytest.approx((45.0, 18.0)), pytest.approx((55.0, 22.0)))
    assert (line.low, line.high) == (pytest.approx((45.0, 72.0)), pytest.approx((55.0, 88.0)))
    assert points(line, pareto)[1] == ("plain decoding", "4 clients", "80 [72, 88] at 20 [18, 22]")
    drawn = svg.draw(pareto)
    assert drawn.count("v6M") == drawn.count("h6M") == 2  # both ends of the intervals of two points, in both directions
    assert not any(name.startswith("load-") for name in charts)


def test_speed_ups_under_load_have_intervals_where_they_are_steady() -> None:
    """At one request a second, groups are twice and eight times as fast; at two requests both arms are saturated."""
    known = {"window_start_s": 0.0, "window_end_s": 10.0, "per_request_arrival_s": [float(at) for at in range(10)]}
    arms = (("autoregressive", 0, [2.0, 8.0] * 5, 5.0), ("ngram", 4, [1.0] * 10, 1.0))
    loads = [
        loaded(rate, method, gamma, median, **known, is_saturated=rate > 1, per_request_latency_s=latencies_s)
        for method, gamma, latencies_s, median in arms
        for rate in (1.0, 2.0)
    ]
    speedup = all_charts.sections([*map(complete, loads)])["load"][0]
    assert isinstance(speedup, Chart)
    (line,) = (each for each in speedup.series if not each.dashed)
    factor = math.exp(math.log(2) * 2.262157 * math.sqrt(10 / 9 / 10))  # see test_load
    assert (line.x, line.y) == ((1.0, 2.0), (5.0, 5.0))
    assert line.low == pytest.approx((5 / factor, 5.0), rel=1e-6)
    assert line.high == pytest.approx((5 * factor, 5.0), rel=1e-6)


def test_the_acceptance_length_is_shown_over_the_text() -> None:
    """Bins of 16 tokens, of which the second holds no step; of two gammas the faster one."""
    cells = [
        decoded("ngram", 2, acceptance_length_over_text=[1.5, None, 2.5], text_bin_tokens=16, speedup=3.0),
        decoded("ngram", 4, acceptance_length_over_text=[9.0], text_bin_tokens=16, speedup=1.0),
        decoded("autoregressive", acceptance_length_over_text=[1.0], text_bin_tokens=16, num_drafted=0),
    ]
    charts = all_charts.sections([*map(complete, cells)])["acceptance"]
    (chart,) = [chart for chart in charts if chart.name.startswith("acceptance-text")]
    assert chart.title.startswith("Acceptance length over the text: specdec\n")
    assert [(line.label, line.x, line.y) for line in chart.series] == [("ngram, gamma 2", (8.0, 40.0), (1.5, 2.5))]
    assert not any("text" in each.name for each in all_charts.sections([complete(decoded("ngram", 2))])["acceptance"])


def test_the_acceptance_length_is_shown_over_the_time_of_service() -> None:
    """Ten parts of five minutes: points at 0.25, 0.75, ... minutes; of two rates the higher one."""
    lengths = [2.0, None, *[1.5] * 8]
    loads = [
        loaded(1.0, "ngram", 4, acceptance_length_over_service=[9.0] * 10, duration_s=300.0),
        loaded(2.0, "ngram", 4, acceptance_length_over_service=lengths, duration_s=300.0),
        loaded(2.0, "autoregressive", 0),
    ]
    charts = all_charts.sections([*map(complete, loads)])["load"]
    (chart,) = [chart for chart in charts if chart.name.startswith("acceptance-service")]
    (line,) = chart.series
    assert (line.label, line.x[:3], line.y[:3]) == ("ngram, gamma 4, 2 requests/s", (0.25, 1.25, 1.75), (2.0, 1.5, 1.5))
    assert (len(line.x), chart.x_label) == (9, "arrival of the request, minutes")


def test_an_unknown_axis_has_a_chart_too() -> None:
    (chart,) = all_charts.pictures([size("depth of tree", 2, 0.003), size("depth of tree", 4, 0.005)])
    assert isinstance(chart, Chart)
    assert (chart.name, chart.series[0].y) == ("depth-of-tree", (3.0, 5.0))


def test_a_run_is_drawn_into_files(tmp_path: Path) -> None:
    """A committed one."""
    runs = [results.read(BASELINE.with_name("drafts-heldout-sampled.json"))]
    paths = rendering.draw(rendering.document(runs), runs, tmp_path / "new")
    kinds = ["overview", *(f"{kind}-specdec" for kind in ("speedup", "acceptance-rate", "system-efficiency"))]
    kinds += [f"{kind}-specdec" for kind in ("acceptance", "draft-time", "scoring-time", "verification-time")]
    kinds += ["latency-specdec", "throughput-specdec"]
    names = [f"{kind}-smollm2-135m-held_out" + ("-batch-1" if "throughput" not in kind else "") for kind in kinds]
    assert [path.name for path in paths] == [f"drafts-heldout-sampled-{name}.svg" for name in names]
    assert all(ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg" for path in paths)


def test_the_committed_charts_are_those_of_their_runs(tmp_path: Path) -> None:
    """After a change of the charts: `python -m bench.report bench/baselines/RUN.json --plots FOLDER`."""
    folder = BASELINE.with_name("plots")
    for name in ("cost-cpu", "engines-cpu", "load-cpu"):
        runs = [results.read(BASELINE.with_name(f"{name}.json"))]
        rendering.draw(rendering.document(runs), runs, tmp_path)
    of_runs = [path for path in sorted(folder.iterdir()) if not path.name.startswith("lossy-modes-")]
    assert len(of_runs) == 14
    assert [path.name for path in of_runs if path.read_text() != (tmp_path / path.name).read_text()] == []


def test_references_to_committed_charts_are_right() -> None:
    """Each chart in the text is a file."""
    text = BASELINE.with_name("README.md").read_text()
    named = re.findall(r"\((plots/[^)]+)\)", text)
    assert len(named) >= 4
    assert all((BASELINE.parent / name).is_file() for name in named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a file that can be read (No such file or directory); check the path"),
        ("no JSON", "must be written by `pytest bench/ --benchmark-json`; JSONDecodeError"),
        ('{"benchmarks": [{"name": "another project"}]}', "must be written by `pytest bench/"),
        ("[1, 2]", "must be written by `pytest bench/"),
    ],
)
def test_invalid_results_are_refused(
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


@pytest.mark.parametrize("option", ["markdown", "csv", "plots"])
def test_only_the_page_needs_more_than_numpy(option: str, tmp_path: Path) -> None:
    done = report_without_jinja(BASELINE, f"--{option}", tmp_path / option)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / option).exists()


def test_a_missing_jinja_is_named(tmp_path: Path) -> None:
    done = report_without_jinja(BASELINE, "--html", tmp_path / "out.html")
    assert done.returncode == 2
    assert re.search(r"html=.*out\.html needs Jinja2 \(.*\); pip install jinja2", done.stderr)
    assert not (tmp_path / "out.html").exists()


def report_without_jinja(*arguments: object) -> subprocess.CompletedProcess[str]:
    missing = ("jinja2", "markupsafe", "matplotlib")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); from bench.report.rendering import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_the_printed_run_lists_its_charts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    machine = {"gpus": [], "cpu_count": 2, "cpu_model": "CPU", "versions": {}, "python_version": "3"}
    width = size("width", 1, 0.004, 0.002) | {"read_bandwidth": 3e10, "roofline_share": 0.5}
    run = {"machine_info": machine, "datetime": "2026-01-01T00", "benchmarks": [{"extra_info": width}]}
    (tmp_path / "cost.json").write_text(json.dumps(run | {"schema_version": 1}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "cost.json"), "--plots", str(tmp_path)])
    rendering.main()
    assert f"drawn: {tmp_path / 'cost-width.svg'}" in capsys.readouterr().out
    assert (tmp_path / "cost-width.svg").is_file()


def test_changes_are_a_forest_plot_per_engine(tmp_path: Path) -> None:
    """Twice as fast beside the same plain decoding, as fast, and a cell that only one of the runs has."""
    rounds = [1.0, 1.5, 2.0, 2.5]
    cells = [decoded("ngram", 2, rounds), decoded("eagle", 2, rounds, engine="vllm")]
    faster = decoded("ngram", 2, [each / 2 for each in rounds], baseline_per_prompt_latency_s=[2 * x for x in rounds])
    before, after = (
        results.read(write(tmp_path / f"{name}.json", records))
        for name, records in (("a", cells), ("b", [faster, cells[1], decoded("ngram", 4, rounds)]))
    )
    one, other = changes.pictures(before, after, differences(before, after))
    assert (one.name, one.title) == ("changes-since-a-specdec", "Times as fast as before: specdec\nb against a")
    assert one.lines == (Line("ngram 2", *[pytest.approx(2)] * 3, 2),)
    assert other.lines == (Line("eagle 2", 1.0, 1.0, 1.0, -1),)
    assert (one.keys, other.keys) == (((2, "faster"),), ((-1, "no difference seen"),))
    assert (one.x_min, one.x_max) == (other.x_min, other.x_max) == (1.0, pytest.approx(2))
    (chapter, *_) = rendering.document([before, after]).chapters
    assert [part.name for part in chapter.sections[0].parts if isinstance(part, Rows)] == [one.name, other.name]


def test_of_many_changes_the_largest_are_shown(tmp_path: Path) -> None:
    """The cell with n drafted tokens has become n % slower, of 1 to 100; the fifty that did not change are none."""
    rounds = [1.0, 1.5]
    plain = {"baseline_per_prompt_latency_s": rounds, "baseline_per_prompt_tokens": [10, 10]}

    def run_of(name: str, growth: float) -> Results:
        gammas = [(n, 1 + growth * n) for n in range(1, 101)] + [(n, 1.0) for n in range(101, 151)]
        cells = [decoded("ngram", n, [each * times for each in rounds], **plain) for n, times in gammas]
        return results.read(write(tmp_path / f"{name}.json", cells))

    before, after = run_of("a", 0.0), run_of("b", 0.01)
    (rows,) = changes.pictures(before, after, differences(before, after))
    assert [line.label for line in rows.lines] == [f"ngram {n}" for n in range(101 - changes.MAX_LINES, 101)]
    assert f"specdec, the {changes.MAX_LINES} largest changes of 150\n" in rows.title
    (equal,) = changes.pictures(before, before, differences(before, before))
    assert len(equal.lines) == changes.MAX_LINES
