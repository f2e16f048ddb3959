"""The benchmark script for GPUs, run without one: it reaches its last line, and a stopped part keeps its cells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from helpers.bench_runs import sized

from bench.measure.journal import Entry, Journal
from specdec.kernels import cpp
from specdec.runtime.artifacts import cache_root

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow
MEASURED = ("roofline", "roofline-135m", "shapes", "transformers")


@pytest.fixture
def variables(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Without a GPU, and with a cache that has the kernels but no default pair."""
    cpp.available(torch.float32)  # compiles them where they are used for the first time
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for kernels in filter(Path.is_dir, cache_root().glob("kernels-*")):
        shutil.copytree(kernels, cache / kernels.name)
    variables = {"SPECDEC_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    unused = {"PYTEST_ADDOPTS": "-p no:hypothesispytest"}  # it imports all of Hypothesis at the end of any run
    return environment | variables | unused


def visit(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "bench" / "gpu.sh"), str(folder)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def names(folder: Path) -> set[str]:
    with tarfile.open(folder / "results.tar.gz") as archive:
        return {os.path.basename(member) for member in archive.getnames()} - {"."}


def test_without_a_gpu_all_parts_run_to_the_last_line(variables: dict[str, str], tmp_path: Path) -> None:
    done = visit(tmp_path / "out", variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU: everything is scaled down (")
    assert done.stdout.splitlines()[-1].endswith(" s; failed: nothing")
    assert "the default pair is left out: its weights are not in the cache" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.tar.gz", "summary.txt"}
    wanted = {f"{part}.{kind}" for part in MEASURED for kind in ("log", "json", "jsonl")}
    assert names(tmp_path / "out") == wanted | {"correctness.log", "summary.txt"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    reported = {line for line in summary.splitlines() if line.endswith(".json")}
    assert reported == {f"{part}.json" for part in MEASURED}


def test_an_interrupted_part_is_reported_from_its_journal(variables: dict[str, str], tmp_path: Path) -> None:
    """A benchmark that has measured two cells, then hangs and ignores SIGINT."""
    journal = Journal.open(tmp_path / "journal", {"cpu_model": "a processor"}, resume=False)
    for size in (1, 5):
        journal.append(f"cost-width-{size}", Entry(sized("width", size, 0.5), [0.5]))
    journal.close()
    python = tmp_path / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        '[[ "$*" != *why_no_gpu* ]] || exit 1\n'
        f'[[ "$*" == *pytest* ]] || exec {sys.executable} "$@"\n'
        'trap "" INT\n'
        'while [ "$1" != --journal ]; do shift; done\n'
        f'cp {tmp_path / "journal"} "$2"\n'
        "sleep 600\n"
    )
    python.chmod(0o755)
    limited = variables | {"PYTHON": str(python), "PARTS": "roofline shapes", "BUDGET": "17", "GRACE": "2"}
    done = visit(tmp_path / "out", limited)
    assert done.returncode == 1
    assert names(tmp_path / "out") == {"roofline.log", "roofline.jsonl", "summary.txt"}
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "roofline.jsonl\n" in summary
    assert sum(line.startswith("width ") for line in summary.splitlines()) == 2
    assert summary.splitlines()[-1].endswith("failed: roofline shapes: no time was left")
