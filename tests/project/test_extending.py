"""docs/extending.md: its package, installed outside the repository, is measured, decodes, and is certified."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from helpers import example_package
from helpers.example_package import PAGE, ROOT
from helpers.warm import run_python

TINY = str(ROOT / "bench" / "catalogue" / "models" / "tiny")
NAMES = {  # as entry points, and as module:attribute
    "entry points": ("years", "recompute", "recent"),
    "references": ("my_package.data:prompts:space", "my_package.engine:kind", "my_package.drafts:method"),
}
Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package's sources, and the folder that it is installed in."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    example_package.install(example_package.write(source), site)
    return source, site


@pytest.fixture(scope="module")
def run(package: tuple[Path, Path]) -> Run:
    """Runs Python with the package installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPECDEC_", "PYTEST_"))}
    environment = kept | {"PYTHONPATH": os.pathsep.join(map(str, (package[1], ROOT)))}

    def python(*arguments: str, folder: Path = ROOT) -> CompletedProcess[str]:
        return run_python(*arguments, cwd=folder, env=environment)

    return python


@pytest.fixture(scope="module")
def measured(run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of a smoke run of the workload, the engine besides specdec, and the method, by both names of each."""
    folder = tmp_path_factory.mktemp("measured")
    workloads, engines, methods = (",".join(names) for names in zip(*NAMES.values(), strict=True))
    options = ["--smoke", "--device", "cpu", "-p", "no:cacheprovider", f"--journal={folder / 'journal.jsonl'}"]
    options += [f"--engines=specdec,{engines}", f"--methods=autoregressive,{methods}", f"--workloads={workloads}"]
    done = run("-m", "pytest", "bench/", *options, f"--benchmark-json={folder / 'out.json'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return [each["extra_info"] for each in json.loads((folder / "out.json").read_text())["benchmarks"]]


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_the_benchmarks_measure_them(measured: list[dict[str, Any]], names: Sequence[str]) -> None:
    """With the same models the engine emits what specdec does, and so does the method, which drafts."""
    workload, engine, method = names
    by_cell = {(each["workload"], each["engine"], each["method"]): each for each in measured}
    drafting, peer = by_cell[workload, "specdec", method], by_cell[workload, engine, "autoregressive"]
    assert (workload, "specdec", "autoregressive") in by_cell
    assert (peer["engine"], peer["engine_version"], peer["method"]) == (engine, "0.1.0", "autoregressive")
    assert peer["num_outputs_equal_reference"] == peer["num_prompts"] == 2
    assert (drafting["engine"], drafting["method"], drafting["num_outputs_equal"]) == ("specdec", method, 2)
    assert drafting["num_drafted"] > 0


def test_the_command_line_decodes_with_the_method(run: Run) -> None:
    """By both names, one after the other: a new interpreter imports for seconds."""
    options = ["--target", TINY, "--load-format", "dummy", "--dtype", "float32", "--max-tokens", "9", "--ignore-eos"]
    code = (
        "import sys\n"
        "from specdec.cli.main import main\n"
        "sys.exit(any([main(['Hello', '--method', method, *sys.argv[1:]]) for method in METHODS]))"
    )
    done = run("-c", code.replace("METHODS", repr([method for _, _, method in NAMES.values()])), *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" draft tokens accepted ") == 2
    assert done.stderr.count("same tokens as plain decoding\n") == 2


def test_its_own_tests_certify_its_proposer(run: Run, package: tuple[Path, Path]) -> None:
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=package[0])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_its_broken_proposer_is_refused_as_documented(run: Run) -> None:
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
