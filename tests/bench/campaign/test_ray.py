"""A campaign on a local Ray cluster of two workers, one of which dies in the middle of a cell.

`tox -e ray` installs Ray and runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]', or tox -e ray")

from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from bench.records import campaigns

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
PAIRS, METHODS = ("tiny-random", "tiny-t5-random"), ("autoregressive", "ngram", "draft_model")
CELLS = [
    f"specdec-{pair}-{method}-{0 if method == 'autoregressive' else 2}-same-smoke-1"
    for pair in PAIRS
    for method in METHODS
]
LIMIT_S = 500


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head without processors, and two workers with one each, which other programs' use of memory does not kill."""
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [started.add_node(num_cpus=1) for _ in range(2)]
    yield started, workers
    started.shutdown()


class Driver:
    """The command in a process, and what it has printed so far."""

    def __init__(self, address: str, folder: Path, environment: dict[str, str]) -> None:
        self._printed = folder / "printed"
        self.results = folder / "out.json"
        command = [sys.executable, "-m", "bench.campaign", "--ray", address, "--smoke", "--device", "cpu"]
        command += ["--engines", "specdec", "--pairs", ",".join(PAIRS), "--methods", ",".join(METHODS)]
        command += ["-p", "no:cacheprovider", "--journal", f"{folder / 'journal.jsonl'}"]
        command += [f"--benchmark-json={self.results}"]
        with self._printed.open("w") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)

    @property
    def printed(self) -> str:
        return self._printed.read_text()

    def wait_for(self, text: str) -> str:
        """The first line with a text."""
        deadline_s = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline_s:
            has_ended = self.process.poll() is not None
            if found := next((line for line in self.printed.splitlines() if text in line), None):
                return found
            assert not has_ended, self.printed
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in {self.printed}")


def node_of(process: int, workers: list[Any]) -> Any:
    """The node that a process descends from."""
    ancestors = {each.pid for each in psutil.Process(process).parents()}
    (node,) = (each for each in workers if each.all_processes[PROCESS_TYPE_RAYLET][0].process.pid in ancestors)
    return node


def test_a_campaign_survives_a_node(
    cluster: tuple[Cluster, list[Any]], tmp_path: Path, environment: dict[str, str]
) -> None:
    started, workers = cluster
    driver = Driver(started.address, tmp_path, environment | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"})
    started_line = driver.wait_for("part 2/2 (tiny-t5-random, same): runs on")
    pytest_process = int(started_line.rpartition(" ")[2])
    driver.wait_for("part 2/2 (tiny-t5-random, same): 1 cells finished")
    journal = tmp_path / "journal" / "part-2-of-2.jsonl"
    kept = journal.read_bytes()
    started.remove_node(node_of(pytest_process, workers), allow_graceful=False)
    assert "lost with" in driver.wait_for("part 2/2 (tiny-t5-random, same): lost")
    assert driver.process.wait(LIMIT_S) == 0, driver.printed
    psutil.wait_procs([psutil.Process(pytest_process)] if psutil.pid_exists(pytest_process) else [], timeout=10)
    assert not psutil.pid_exists(pytest_process)  # it did not outlive its node
    assert 2 <= kept.count(b"\n") < len(METHODS) + 1
    assert journal.read_bytes().startswith(kept)
    output = json.loads(driver.results.read_text())
    assert [each["param"] for each in output["benchmarks"]] == CELLS
    assert (output["shard"], output["cells_of_shards"]) == (None, [len(CELLS)])
    assert output["command"].startswith("python -m bench.campaign --ray ")
    (run,) = campaigns.read_all([driver.results])
    assert not run.missing_shards
    assert {record["pair"] for record in run.cells} == set(PAIRS)
