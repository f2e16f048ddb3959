"""Mutate a module, one small change at a time, and list the changes that no test sees; see README.md beside this.

A run can be interrupted and goes on where it stopped: cosmic-ray keeps what is done in a session file. The changes are
made in a copy of the tree, under build/mutation, never in the sources.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutation"
JOBS = {  # module -> the tests that are to see its mutants
    "specdec/stats.py": "tests/test_stats.py",
    "specdec/verification.py": (
        "tests/verification/test_verification.py tests/verification/test_block_verification.py "
        "tests/verification/test_coupled_verification.py"
    ),
    "specdec/trees/verification.py": "tests/trees/test_trees.py",
    "specdec/sampling/state.py": "tests/sampling/test_sampling.py tests/sampling/test_declared_distributions.py",
    "specdec/sampling/distributions.py": "tests/sampling/test_sampling.py tests/verification/test_verification.py",
    "specdec/proposers/adaptive.py": "tests/proposers/test_adaptive.py",
    "specdec/conformance/verdicts.py": "tests/conformance/test_verdicts.py tests/conformance/test_audit.py",
    "specdec/conformance/audit.py": "tests/conformance/test_verdicts.py tests/conformance/test_audit.py",
    "specdec/conformance/arms.py": "tests/conformance/test_audit.py",
    "specdec/conformance/statistics/betting.py": "tests/conformance/test_betting.py tests/conformance/test_verdicts.py",
    "specdec/conformance/statistics/instruments.py": "tests/conformance/test_instruments.py",
    "specdec/conformance/statistics/facts.py": "tests/conformance/test_facts.py",
    "specdec/conformance/reference.py": "tests/conformance/test_reference.py",
    "specdec/conformance/certificate.py": "tests/conformance/test_certificate.py",
    "specdec/conformance/enumeration.py": "tests/conformance/test_enumeration.py",
    "bench/measure/records.py": "tests/bench/measure/test_records.py",
    "bench/records/intervals.py": ("tests/bench/records/test_intervals.py tests/bench/analysis/test_run_diff.py"),
    "bench/analysis/run_diff.py": "tests/bench/analysis/test_run_diff.py",
    "bench/workloads/extraction.py": "tests/bench/workloads/test_extraction.py",
}
LAST_KILLERS = 8  # tests that failed last are run first: neighboring mutants tend to fail the same one
OPTIONS = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
CONFIG = """\
[cosmic-ray]
module-path = "{module}"
timeout = {timeout_s}
excluded-modules = []
test-command = "{python} -m pytest -q -x -p no:cacheprovider {tests}"

[cosmic-ray.distributor]
name = "local"

[cosmic-ray.filters.operators-filter]
exclude-operators = [
  "core/ReplaceBinaryOperator_.*_(RShift|LShift|Pow|Mod|FloorDiv|BitXor|BitOr|BitAnd)",
  "core/ReplaceBinaryOperator_BitOr_.*",
]
"""


def prepare(module: str, timeout_s: float) -> Path:
    """The folder of a module's job, with a copy of the tree and a session; what is there is gone on with."""
    folder = WORK / module.replace("/", ".").removesuffix(".py")
    if not (folder / "session.sqlite").exists():
        shutil.rmtree(folder, ignore_errors=True)
        ignored = shutil.ignore_patterns("build", ".git", ".venv", "__pycache__", ".tox", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, folder / "tree", ignore=ignored)
        shutil.copy(ROOT / module, folder / "original.py")
        values = {"module": module, "tests": JOBS[module], "timeout_s": timeout_s, "python": sys.executable}
        (folder / "config.toml").write_text(CONFIG.format(**values))
        cosmic_ray(folder, "init", "session.sqlite")
        # of two numbers any operator of bits raises, and | stands in annotations, which nothing reads
        run(folder, "cosmic_ray.tools.filters.operators_filter", "../session.sqlite", "../config.toml")
    shutil.copy(folder / "original.py", folder / "tree" / module)  # a run that was killed leaves its mutant
    return folder


def cosmic_ray(folder: Path, verb: str, *arguments: str) -> None:
    run(folder, "cosmic_ray.cli", verb, "../config.toml", *(f"../{each}" for each in arguments))


def run(folder: Path, module: str, *arguments: str) -> None:
    """Run a Python module in the copy of the tree."""
    tree = folder / "tree"
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
    }  # an installed copy, or the sources, would be tested unmutated
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=tree, env=environment, check=True)


class QuickestFirst:
    """A pytest plugin that orders tests: the last ones to fail, then by how long each takes, quickest first.

    Without a time a test counts as instant, so that it is timed. `killed_by` has the test that failed.
    """

    def __init__(self, times_s: dict[str, float], last_killers: list[str]) -> None:
        self.times_s, self._last_killers, self.killed_by = times_s, last_killers, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        rank = {name: number for number, name in enumerate(self._last_killers)}
        items.sort(key=lambda item: (rank.get(item.nodeid, len(rank)), self.times_s.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.times_s[report.nodeid] = self.times_s.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.killed_by:
            self.killed_by = report.nodeid


def forked(tests: str, plugin: QuickestFirst, timeout_s: float) -> tuple[int | None, dict[str, Any]]:
    """Run tests in a fork: its exit status, None if it took too long, and what its plugin saw."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            code = int(pytest.main([*OPTIONS, *tests.split()], plugins=[plugin]))
            os.write(
                writing,
                json.dumps(
                    {"killed_by": plugin.killed_by, "times_s": plugin.times_s, "modules": _project_modules()}
                ).encode(),
            )
        finally:  # whatever happens, a fork must not go on with the session
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as answer:
        ready = select.select([answer], [], [], timeout_s)[0]
        if not ready:
            os.killpg(pid, signal.SIGKILL)
        seen = answer.read()
    status = os.waitpid(pid, 0)[1]
    return (status if ready else None), json.loads(seen or "{}")


def _project_modules() -> list[str]:
    return sorted(name for name in sys.modules if name.partition(".")[0] in ("specdec", "bench"))


def preload(names: Iterable[str], mutated: str) -> None:
    """Import modules once for all forks, except the mutated one and those that import it, directly or not."""
    for name in names:
        importlib.import_module(name)
    imports = {name: set(_imports(sys.modules[name])) for name in names}
    stale, known = {mutated}, set[str]()
    while stale != known:
        known = set(stale)
        stale |= {name for name, imported in imports.items() if imported & known}
    for name in stale & sys.modules.keys():
        module, (package, _, attribute) = sys.modules.pop(name), name.rpartition(".")
        if package in sys.modules and vars(sys.modules[package]).get(attribute) is module:
            delattr(sys.modules[package], attribute)  # or `from package import module` finds the old one


def _imports(module: ModuleType) -> Iterator[str]:
    """Names of modules that a module's source imports, anywhere; some are names of objects in modules."""
    for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def work(session: str, module: str, timeout_s: float, sample: int | None, seed: int) -> None:
    """Try what is left of a session, in the copy of the tree: each mutant in a fork, so that torch is imported once."""
    import cosmic_ray.mutating as mutating
    import hypothesis  # noqa: F401  # imported once for all forks
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome

    torch.set_num_threads(1)  # threads do not survive a fork
    tests = JOBS[module]
    status, seen = forked(tests, QuickestFirst({}, []), timeout_s)
    if status != 0:
        raise SystemExit(
            f"tests of the unmutated module must pass; exit status {status}, {seen.get('killed_by')} failed"
        )
    preload(seen["modules"], module.removesuffix(".py").replace("/", "."))
    times_s, killers = seen["times_s"], []

    def run_tests(command: str, timeout: float) -> tuple[mutating.TestOutcome, str]:
        status, seen = forked(tests, QuickestFirst(dict(times_s), killers), timeout)
        killer = seen.get("killed_by", "")
        if killer:
            killers[:] = [killer, *(each for each in killers if each != killer)][:LAST_KILLERS]
        outcome = mutating.TestOutcome.SURVIVED if status == 0 else mutating.TestOutcome.KILLED
        return outcome, "timeout" if status is None else killer

    mutating.run_tests = run_tests
    with use_db(session, WorkDB.Mode.open) as database:
        pending = {item.job_id for item in database.pending_work_items}
        skipped = {job for job, result in database.results if result.worker_outcome == WorkerOutcome.SKIPPED}
        items = [item for item in database.work_items if item.job_id not in skipped]
        items.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        random.Random(seed).shuffle(items)
        for item in items[:sample]:
            if item.job_id in pending:
                database.set_result(item.job_id, mutating.mutate_and_test(item.mutations, "", timeout_s))


def results(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each mutant with its result, None if it has not been run; without those that the filter left out."""
    command = [sys.executable, "-m", "cosmic_ray.cli", "dump", "session.sqlite"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    pairs = map(json.loads, done.stdout.splitlines())
    return [(item, result) for item, result in pairs if not result or result["worker_outcome"] != "skipped"]


def table(folder: Path) -> Iterator[str]:
    """How many mutants were run and killed, and a table row for each survivor; verdicts are added by hand."""
    mutants = results(folder)
    outcomes = [result["test_outcome"] for _, result in mutants if result]
    num_survived = outcomes.count("survived")
    num_killed = len(outcomes) - num_survived
    yield f"{len(mutants)} mutants, {len(outcomes)} run: {num_killed} killed, {num_survived} survived."
    yield from ("", "| line | mutant | the line as changed | verdict |", "|---|---|---|---|")
    survived = [(item, result) for item, result in mutants if result and result["test_outcome"] == "survived"]
    yield from sorted((_row(item["mutations"][0], result["diff"]) for item, result in survived), key=_line_number)


def _row(mutation: dict[str, Any], diff: str) -> str:
    added = (line[1:].strip() for line in diff.splitlines() if line[:1] == "+" and line[:3] != "+++")
    changed = " ".join(added).replace("|", "\\|")
    operator = mutation["operator_name"].removeprefix("core/")
    return f"| {mutation['start_pos'][0]} | {operator} {mutation['occurrence']} | `{changed}` | |"


def _line_number(row: str) -> int:
    return int(row.split("|")[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python mutation/run.py", description=__doc__)
    parser.add_argument("module", choices=JOBS, nargs="*", default=list(JOBS), help="all by default, one by one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutant")
    parser.add_argument("--sample", type=int, help="run only so many mutants of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; mutants run in a random order anyway")
    parser.add_argument("--work", metavar="SESSION", help=argparse.SUPPRESS)  # what a job runs in its copy
    parser.add_argument("--list", action="store_true", help="print the table of survivors so far, run nothing")
    given = parser.parse_args()
    if given.work:
        return work(given.work, given.module[0], given.timeout, given.sample, given.seed)
    for module in given.module:
        folder = prepare(module, given.timeout)
        if not given.list:
            options = ["--timeout", str(given.timeout), "--seed", str(given.seed)]
            options += ["--sample", str(given.sample)] if given.sample is not None else []
            run(folder, "mutation.run", module, "--work", "../session.sqlite", *options)
        print(f"# {module}\n", *table(folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
