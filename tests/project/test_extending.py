"""docs/extending.md: its package, installed outside the repository, is measured, decodes, and is certified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import example_package
from helpers.example_package import PAGE, ROOT

TINY = str(ROOT / "bench" / "catalogue" / "models" / "tiny")
NAMES = {  # as entry points, and as module:attribute
    "entry points": ("years", "recompute", "recent"),
    "references": ("my_package.data:prompts:space", "my_package.engine:kind", "my_package.drafts:method"),
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package's sources, and the folder that it is installed in."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    example_package.install(example_package.write(source), site)
    return source, site


@pytest.fixture
def run(package: tuple[Path, Path]) -> Run:
    """Runs Python with the package installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECDEC_", "PYTEST_"))}
    environment = kept | {"PYTHONPATH": os.pathsep.join(map(str, (package[1], ROOT)))}

    def python(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return python


def measured(run: Run, folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a smoke run of a workload, an engine besides specdec, and a method."""
    workload, engine, method = names
    options = ["--smoke", "--device", "cpu", "-p", "no:cacheprovider", f"--journal={folder / 'journal.jsonl'}"]
    options += [f"--engines=specdec,{engine}", f"--methods=autoregressive,{method}", f"--workloads={workload}"]
    done = run("-m", "pytest", "bench/", *options, f"--benchmark-json={folder / 'out.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return [each["extra_info"] for each in json.loads((folder / "out.json").read_text())["benchmarks"]]


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_benchmarks_measure_them(run: Run, tmp_path: Path, names: Sequence[str]) -> None:
    """With the same models the engine emits what specdec does, and so does the method, which drafts."""
    workload, engine, method = names
    plain, drafting, theirs = measured(run, tmp_path, names)
    assert {record["workload"] for record in (plain, drafting, theirs)} == {workload}
    assert (theirs["engine"], theirs["engine_version"], theirs["method"]) == (engine, "0.1.0", "autoregressive")
    assert theirs["num_outputs_equal_reference"] == theirs["num_prompts"] == 2
    assert (drafting["engine"], drafting["method"], drafting["num_outputs_equal"]) == ("specdec", method, 2)
    assert drafting["num_drafted"] > 0


@pytest.mark.parametrize("method", ["recent", "my_package.drafts:method"])
def test_the_command_line_decodes_with_the_method(run: Run, method: str) -> None:
    options = ["--target", TINY, "--load-format", "dummy", "--dtype", "float32", "--max-tokens", "9", "--ignore-eos"]
    done = run("-m", "specdec", "Hello", "--method", method, *options)
    assert done.returncode == 0, done.stderr
    assert " draft tokens accepted " in done.stderr
    assert done.stderr.endswith("same tokens as plain decoding\n")


def test_its_own_tests_certify_its_proposer(run: Run, package: tuple[Path, Path]) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=package[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_its_broken_proposer_is_refused_as_the_page_says(run: Run) -> None:
    code = (
        "from my_package.broken import MostFrequentToken as Broken\n"
        "from specdec.conformance.kit import certify_proposer\n"
        "certify_proposer(lambda target, uniforms: Broken(target.vocab_size, target.device, uniforms))"
    )
    done = run("-c", code)
    assert done.returncode == 1
    (message,) = (line for line in done.stderr.splitlines() if "NotCertified: " in line)
    assert message.partition("NotCertified: ")[2] in " ".join(PAGE.read_text().split())


def test_nothing_is_imported_until_it_is_named(run: Run) -> None:
    code = (
        "import sys\n"
        "from bench.engines.registry import parse_engine, parse_method\n"
        "from bench.workloads.registry import parse_workloads\n"
        "from specdec.methods import is_method\n"
        "parse_engine('engines', 'specdec'), parse_method('methods', 'ngram'), parse_workloads('workloads', 'smoke')\n"
        "assert is_method('recent')\n"
        "print('my_package' in sys.modules)\n"
        "parse_workloads('workloads', 'years')\n"
        "print('my_package.data' in sys.modules, 'my_package.engine' in sys.modules)"
    )
    done = run("-c", code)
    assert done.stdout.split() == ["False", "True", "False"], done.stderr
