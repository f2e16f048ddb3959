"""The whole harness on a tiny random model: a run is killed, resumed, and replayed."""

from __future__ import annotations

import html
import json
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.warm import run_python

from bench.catalogue.methods import SMOKE_METHODS
from bench.measure.journal import Entry, Journal
from bench.records import campaigns, fields
from bench.records.sweeps import SMOKE_SWEEPS
from bench.report import rendering
from bench.report.html import page

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
Killed = tuple[Path, list[str]]
Resumed = tuple[Path, dict[str, Any], str]
OWN_TABLE = ("--benchmark-columns=median",)  # asks for pytest-benchmark's
CELLS = [
    f"{engine}-tiny-random-{method}-{0 if method == 'autoregressive' else 2}-same-smoke-1"
    for engine, methods in (
        ("specdec", SMOKE_METHODS),
        ("transformers", ("autoregressive", "ngram", "draft_model")),
    )
    for method in methods
]


def command(folder: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "bench/",
        "--smoke",
        "--device",
        "cpu",
        "-p",
        "no:cacheprovider",
        "--journal",
        str(folder / "journal.jsonl"),
        *arguments,
    ]


def cost_command(folder: Path) -> list[str]:
    return [part.replace("bench/", "bench/cost_sweep.py") for part in command(folder)]


def finish(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(*command(folder, *arguments)[1:], cwd=ROOT, env=environment)


def finished_cells(folder: Path) -> list[str]:
    """Complete lines of the journal, after the first."""
    journal = folder / "journal.jsonl"
    return journal.read_text().split("\n")[1:-1] if journal.exists() else []


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Killed:
    """A folder with the journal of a run that was killed after its second cell, and the lines it had."""
    folder = tmp_path_factory.mktemp("run")
    with subprocess.Popen(command(folder), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        while len(finished_cells(folder)) < 2 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return folder, finished_cells(folder)


@pytest.fixture(scope="module")
def resumed(killed: Killed, environment: dict[str, str]) -> Resumed:
    """The folder, the JSON and the printout of the run that continued the killed one."""
    folder, _ = killed
    done = finish(folder, environment, "--resume", f"--benchmark-json={folder / 'out.json'}")
    assert done.returncode == 0, done.stdout
    return folder, json.loads((folder / "out.json").read_text()), done.stdout


def test_records_have_exactly_the_declared_fields(resumed: Resumed) -> None:
    for cell in resumed[1]["benchmarks"]:
        assert set(cell["extra_info"]) == fields.names("cells")


def test_a_killed_run_is_resumed_where_it_was(killed: Killed, resumed: Resumed) -> None:
    _, before = killed
    folder, output, printout = resumed
    assert finished_cells(folder)[: len(before)] == before
    assert f"specdec: {3 * len(SMOKE_METHODS)} cells, {len(before)} of them taken from the journal" in printout
    assert [cell["params"]["engine"] + "-" + cell["param"].partition("-")[2] for cell in output["benchmarks"]] == CELLS
    for line, cell in zip(map(json.loads, finished_cells(folder)), output["benchmarks"], strict=True):
        assert line["rounds_s"] == cell["stats"]["data"]
        assert line["record"] == cell["extra_info"]


def test_results_record_their_origin_but_not_the_host(resumed: Resumed) -> None:
    _, output, _ = resumed
    assert output["schema_version"] == 1
    assert "node" not in output["machine_info"]
    assert {"versions", "cpu_model", "torch_num_threads"} <= set(output["machine_info"])
    assert output["command"].startswith("pytest bench/ --smoke --device cpu ")
    assert output["configuration"]["gammas"] == [2]
    assert len(output["configuration"]["prompts_sha256"]) == 64


def test_a_run_can_be_reported(resumed: Resumed) -> None:
    (run,) = campaigns.read_all([resumed[0] / "out.json"])
    html_page = page.render(rendering.document([run]))
    assert "Random weights: only times are meaningful" in html_page
    assert html_page.count('class="point"') > 100
    assert run.command in html.unescape(html_page)


def test_counts_are_those_of_a_draft_that_is_the_target(resumed: Resumed) -> None:
    records = {cell["param"]: cell["extra_info"] for cell in resumed[1]["benchmarks"]}
    for engine in ("specdec", "transformers"):
        record = records[f"{engine}-tiny-random-draft_model-2-same-smoke-1"]
        assert record["acceptance_rate"] == 1
        assert record["num_outputs_equal"] == record["num_prompts"] == 2
        assert (record["energy_j"] is None) == (record["energy_reason"] is not None)
        assert record["telemetry_hz"] == 10
    assert len({record["output_sha256"] for record in records.values()}) == 1


def test_the_table_is_printed_and_skips_have_a_reason(resumed: Resumed) -> None:
    printout = resumed[2]
    assert "tiny-random, float32 on cpu; smoke, 2 prompts of up to 8 tokens, batch size 1" in printout
    assert "specdec is faster" in printout
    assert "Name (time in" not in printout  # pytest-benchmark's own table
    assert "engine=transformers has no method=ngram_store; use" in printout


def test_a_finished_journal_is_replayed_and_two_runs_compare(resumed: Resumed, environment: dict[str, str]) -> None:
    folder, output, _ = resumed
    done = finish(folder, environment, "--resume", f"--benchmark-json={folder / 'again.json'}", *OWN_TABLE)
    assert done.returncode == 0
    assert "Name (time in" in done.stdout
    again = json.loads((folder / "again.json").read_text())
    for cell, replayed in zip(output["benchmarks"], again["benchmarks"], strict=True):
        assert replayed["stats"] == cell["stats"]
        assert replayed["extra_info"] == cell["extra_info"]
    compare = [sys.executable, "-m", "pytest_benchmark", "compare", "--group-by=param:gamma"]
    done = subprocess.run(
        [*compare, folder / "out.json", folder / "again.json"], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "gamma=2" in done.stdout + done.stderr


def test_another_configuration_is_not_mixed_in(resumed: Resumed, environment: dict[str, str]) -> None:
    done = finish(resumed[0], environment, "--resume", "--seed", "1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "must have this configuration to be resumed, but seed was 0 and is 1" in done.stderr


PLANTED = """
import signal, weakref
import pytest
from bench.measure.cells.closed_loop import ClosedLoop

class Thing: pass

def lost():
    thing = Thing()
    kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    return kept

def measured(self, *_):
    lost()
    {then}

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
ClosedLoop.measure = measured
"""


@pytest.mark.parametrize("then", ["pass", "pytest.fail('a worker has ended')"])
def test_an_interrupt_that_python_loses_ends_the_run_and_fails_nothing(
    then: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    """In a callback of a weak reference KeyboardInterrupt is only reported; the report looked like a failure."""
    (tmp_path / "planted.py").write_text(PLANTED.format(then=then))
    paths = f"{tmp_path}:{environment.get('PYTHONPATH', '')}"
    done = finish(tmp_path, environment | {"PYTHONPATH": paths}, "-p", "planted", "--engines=specdec")
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
    assert "KeyboardInterrupt" in done.stdout
    assert "failed" not in done.stdout
    assert finished_cells(tmp_path) == []


def test_two_runs_with_one_journal(tmp_path: Path, environment: dict[str, str]) -> None:
    """The second is refused before it measures anything, and the first one's cells stay."""
    with closing(Journal.open(tmp_path / "journal.jsonl", {}, resume=False)) as journal:
        journal.append("a", Entry({}, [0.1]))
        done = finish(tmp_path, environment)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "must be used by one run at a time, but another run is writing it" in done.stderr
    assert len(finished_cells(tmp_path)) == 1


def test_costs_are_measured_and_printed(tmp_path: Path, environment: dict[str, str]) -> None:
    output = [f"--benchmark-json={tmp_path / 'out.json'}"]
    done = run_python(*cost_command(tmp_path)[1:], *output, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout
    records = [cell["extra_info"] for cell in json.loads((tmp_path / "out.json").read_text())["benchmarks"]]
    assert {record["axis"] for record in records} == set(SMOKE_SWEEPS)
    assert set().union(*records) == fields.names("costs")
    assert all(record["median_s"] > 0 and record["read_bandwidth"] > 0 for record in records)
    assert all((record["roofline_share"] is None) == (record["bytes_read"] is None) for record in records)
    assert len({record["read_bandwidth"] for record in records}) == 1
    before, first_cell, _ = done.stdout.partition("bench/cost_sweep.py .")
    assert first_cell
    assert "roofline: memory is read at" in before
    assert "Phases of a decode step" in done.stdout


def test_a_trace_is_replayed(tmp_path: Path, environment: dict[str, str]) -> None:
    """Five requests of a trace of 8 s, at a mean of 8 a second: all arrive within half a second, with their lengths."""
    lengths, outputs = (5, 9, 5, 12, 7), (3, 8, 2, 4, 6)
    rows = [
        {"timestamp": 2000 * number, "input_length": length, "output_length": output}
        for number, (length, output) in enumerate(zip(lengths, outputs, strict=True))
    ]
    trace = tmp_path / "calls.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    journal = tmp_path / "journal.jsonl"
    options = (
        "--engines",
        "specdec",
        "--methods",
        "ngram",
        "--workloads",
        str(trace),
        "--rate",
        "8",
        "--duration",
        "1",
    )
    done = run_python(*command(tmp_path, *options)[1:], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = [line["record"] for line in map(json.loads, journal.read_text().splitlines()[1:]) if "record" in line]
    assert record["per_request_arrival_s"] == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    assert record["per_request_length"] == list(lengths)
    assert record["per_request_tokens"] == list(outputs)
    assert (record["arrivals"], record["prompt_source"], record["num_finished"]) == ("trace", "random tokens", 5)
