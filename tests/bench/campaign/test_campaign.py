"""A campaign on several machines, with a disk that runs full and a GPU that vanishes: finished cells are never lost."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.warm import run_python

from bench.campaign import arrivals
from bench.campaign.config import BenchConfig
from bench.campaign.shards import part_of
from bench.measure.session import Session
from bench.records import campaigns, fields
from bench.report import rendering
from bench.report.html import page

ROOT = Path(__file__).parents[3]
DURATION_S, RATES, METHODS = 0.4, "20,40,80", ("autoregressive-0", "ngram-2")
CELLS = {f"specdec-tiny-random-{method}-same-smoke-2-{rate}" for method in METHODS for rate in RATES.split(",")}
PARTS = {cell: part_of(f"specdec-tiny-random-any-0-same-smoke-2-{cell.rpartition('-')[2]}", 2) for cell in CELLS}


def run(
    folder: Path, environment: dict[str, str], shard: str, *arguments: str, most_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a shard of the campaign. most_bytes: limit on the size of its files, set with RLIMIT_FSIZE."""
    command = ["-m", "pytest", "bench/", "--smoke", "--device", "cpu", "-p", "no:cacheprovider"]
    command += ["--engines", "specdec", "--methods", "autoregressive,ngram", "--rate", RATES, "--batch-sizes", "2"]
    command += ["--duration", str(DURATION_S)]
    command += ["--shard", shard, "--journal", str(folder / "journal.jsonl"), *arguments]
    environment = environment | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    if most_bytes is None:
        return run_python(*command, cwd=ROOT, env=environment)
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes)),
    )


def finished(folder: Path) -> list[dict[str, Any]]:
    """The journal's complete lines after the first."""
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().split("\n")[1:-1]]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """The folder of the larger shard, and its runs: with a full disk, then resumed."""
    folder = tmp_path_factory.mktemp("campaign")
    larger = max((1, 2), key=list(PARTS.values()).count)
    full = run(folder, environment, f"{larger}/2", most_bytes=13_000)
    kept = finished(folder)
    rest = run(folder, environment, f"{larger}/2", "--resume", f"--benchmark-json={folder / 'out.json'}")
    return folder, {"larger": larger, "full": full, "kept": kept, "rest": rest}


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_keeps_finished_cells(campaign: Any) -> None:
    folder, found = campaign
    assert found["full"].returncode == 3, found["full"].stdout
    assert "must be writable (File too large); the cells before this one are in it: free space" in found["full"].stdout
    assert 1 <= len(found["kept"]) < 4
    assert found["rest"].returncode == 0, found["rest"].stdout
    assert f"{len(found['kept'])} of them taken from the journal" in found["rest"].stdout
    assert finished(folder)[: len(found["kept"])] == found["kept"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_results_that_cannot_be_written_are_no_loss(campaign: Any, environment: dict[str, str]) -> None:
    folder, found = campaign
    before = finished(folder)
    again = run(folder, environment, f"{found['larger']}/2", "--resume", "--benchmark-json=/dev/full")
    assert again.returncode == 3, again.stdout
    expected = "benchmark_json=/dev/full must be writable (No space left on device); all finished cells are in "
    assert f"{expected}{folder / 'journal.jsonl'}: free space and run again with --resume" in again.stdout
    assert "Under load" in again.stdout  # the tables are printed all the same
    assert finished(folder) == before


@pytest.mark.slow
def test_a_shard_has_its_cells_and_its_number(campaign: Any) -> None:
    folder, found = campaign
    larger, output = found["larger"], json.loads((folder / "out.json").read_text())
    assert {cell["param"] for cell in output["benchmarks"]} == {cell for cell in CELLS if PARTS[cell] == larger}
    assert (output["shard"], output["configuration"]["shard"]) == (f"{larger}/2",) * 2
    assert output["cells_of_shards"] == [list(PARTS.values()).count(part) for part in (1, 2)]
    assert output["command"].startswith("pytest bench/ --smoke")
    assert "Under load" in found["rest"].stdout
    for cell in output["benchmarks"]:
        assert cell["params"]["rate"] == cell["extra_info"]["rate"]
        assert set(cell["extra_info"]) == fields.names("loads")


@pytest.mark.slow
def test_a_shard_can_be_reported_with_a_note_on_missing_ones(campaign: Any) -> None:
    folder, found = campaign
    (run,) = campaigns.read_all([folder / "out.json"])
    assert run.missing_shards == (3 - found["larger"],)
    html_page = page.render(rendering.document([run]))
    assert f"{run.shortage}." in html_page
    assert html_page.count("Speed-up under load: specdec") >= 1


def test_another_part_does_not_resume_it(make_config: Callable[..., BenchConfig], tmp_path: Path) -> None:
    config = make_config(shard="1/2", journal=tmp_path / "journal.jsonl")
    with closing(Session(config)) as first:
        first.open()
    with closing(Session(dataclasses.replace(config, shard="2/2", resume=True))) as other:
        expected = "must have this configuration to be resumed, but shard was '1/2' and is '2/2'"
        with pytest.raises(ValueError, match=expected):
            other.open()


@pytest.mark.slow
def test_records_are_of_the_same_arrivals_and_add_up(campaign: Any) -> None:
    folder, _ = campaign
    records = [line["record"] for line in finished(folder)]
    by_rate: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        by_rate.setdefault(record["rate"], []).append(record)
    for rate, found in by_rate.items():
        assert {record["method"] for record in found} == {"autoregressive", "ngram"}
        expected = list(arrivals.arrivals(rate, DURATION_S, "poisson", 0))
        for record in found:
            assert record["per_request_arrival_s"] == expected
            assert record["num_requests"] == record["num_finished"] == len(expected)
            assert (record["num_unfinished"], record["num_refused"]) == (0, 0)
            assert record["num_tokens"] == sum(record["per_request_tokens"]) == 8 * len(expected)
            assert record["ttft_p50_s"] <= record["ttft_p95_s"] <= record["ttft_p99_s"] <= record["latency_p99_s"]
            assert 0 <= record["queue_p50_s"] <= record["ttft_p50_s"]
            assert 0 < record["busy_rate"] < 1
        assert len({record["output_sha256"] for record in found}) == 1  # greedy: every method emits the same tokens


# -- a part without cells ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_part_without_cells_is_done_too(tmp_path: Path, environment: dict[str, str]) -> None:
    used = {part_of(cell, 40) for cell in CELLS} | {
        part_of(f"specdec-tiny-random-any-0-same-smoke-2-{rate}", 40) for rate in RATES.split(",")
    }
    empty = next(part for part in range(1, 41) if part not in used)
    done = run(tmp_path, environment, f"{empty}/40")
    assert done.returncode == pytest.ExitCode.OK, done.stdout
    assert "deselected" in done.stdout


# -- a GPU that vanishes -------------------------------------------------------------------------------------


@pytest.fixture
def session(make_config: Callable[..., BenchConfig], tmp_path: Path) -> Any:
    config = make_config(
        engines=("specdec",), methods=("autoregressive", "ngram"), gammas=(2,), journal=tmp_path / "journal.jsonl"
    )
    with closing(Session(config)) as session:
        session.open()
        yield session


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.AcceleratorError("CUDA error: GPU is lost\nCompile with TORCH_USE_CUDA_DSA"),
            r"device=cpu must keep working, but CUDA error: GPU is lost; finished cells are in the journal.* --resume",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            r"device=cpu must have room for this cell, but CUDA out of memory\. .*; lower --batch-sizes",
        ),
    ],
)
def test_a_gpu_that_fails_mid_run_marks_its_cell_and_loses_no_other(
    error: Exception, message: str, session: Session, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second cell's tenth target call is the last that the GPU makes."""
    plain, ngram = (each.cell for each in session.plans)
    session.run("cells", plain, benchmark)
    engine: Any = session.models.loaded("specdec")
    forward, calls = engine.target.forward, iter(range(10))

    def lost(*arguments: Any, **keywords: Any) -> Any:
        if next(calls, None) is None:
            raise error
        return forward(*arguments, **keywords)

    monkeypatch.setattr(engine.target, "forward", lost)
    with pytest.raises(pytest.fail.Exception, match=message):
        session.run("cells", ngram, benchmark)
    assert set(session.journal.cells) == {plain.id}
    session.close()
    resumed = dataclasses.replace(session.config, resume=True)
    with closing(Session(resumed)) as again:
        again.open()
        assert again.num_resumed == 1


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_a_gpu_with_too_little_memory_is_reported(session: Session, benchmark: Any, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 130.00 GiB")

    monkeypatch.setattr("bench.measure.models.load_engine", full)
    with pytest.raises(pytest.fail.Exception, match=r"must have room for this cell, but CUDA out of memory\."):
        session.run("cells", session.plans[0].cell, benchmark)


@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")
def test_another_error_is_no_failure_of_the_gpu(session: Session, benchmark: Any, monkeypatch: Any) -> None:
    from bench.engines.specdec import SpecdecEngine

    def wrong(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(SpecdecEngine, "generate", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        session.run("cells", session.plans[0].cell, benchmark)
