"""Mutate a module, one small change at a time, and list the changes that no test sees; see README.md beside this.

A run can be interrupted and goes on where it stopped: cosmic-ray keeps what is done in a session file. The changes are
made in a copy of the tree, under build/mutation, never in the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutation"
JOBS = {  # module -> the tests that are to see its mutants
    "specdec/stats.py": "tests/test_stats.py",
    "specdec/verification.py": (
        "tests/verification/test_verification.py tests/verification/test_block_verification.py tests/test_lossless.py"
    ),
    "specdec/trees/verification.py": "tests/trees/test_trees.py tests/trees/test_tree_decoding.py",
    "specdec/sampling/state.py": "tests/sampling/test_sampling.py tests/sampling/test_declared_distributions.py",
    "specdec/proposers/adaptive.py": "tests/proposers/test_adaptive.py tests/sampling/test_adaptive_sampling.py",
    "specdec/conformance/verdicts.py": "tests/conformance/test_verdicts.py tests/conformance/test_audit.py",
    "specdec/conformance/audit.py": "tests/conformance/test_verdicts.py tests/conformance/test_audit.py",
    "specdec/conformance/arms.py": "tests/conformance/test_audit.py",
    "specdec/conformance/betting.py": "tests/conformance/test_betting.py tests/conformance/test_verdicts.py",
    "specdec/conformance/instruments.py": "tests/conformance/test_instruments.py",
    "specdec/conformance/facts.py": "tests/conformance/test_facts.py",
    "specdec/conformance/reference.py": "tests/conformance/test_reference.py",
    "specdec/conformance/certificate.py": "tests/conformance/test_certificate.py",
    "specdec/conformance/enumeration.py": "tests/conformance/test_enumeration.py",
    "bench/measure/records.py": "tests/bench/measure/test_records.py tests/bench/measure/test_serving.py",
    "bench/records/intervals.py": (
        "tests/bench/records/test_intervals.py "
        "tests/bench/analysis/test_run_diff.py "
        "tests/bench/measure/test_quality.py"
    ),
    "bench/analysis/run_diff.py": "tests/bench/analysis/test_run_diff.py",
    "bench/workloads/extraction.py": "tests/bench/workloads/test_extraction.py",
}
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
        cosmic_ray(folder, "baseline")  # the tests pass without a mutant, or this fails
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


def work(session: str, tests: str, timeout_s: float) -> None:
    """Try what is left of a session, in the copy of the tree: each mutant in a fork, so that torch is imported once."""
    import cosmic_ray.mutating as mutating
    import hypothesis  # noqa: F401  # imported once for all forks
    import pytest
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from cosmic_ray.work_db import WorkDB, use_db

    torch.set_num_threads(1)  # threads do not survive a fork

    def forked(command: str, timeout: float) -> tuple[mutating.TestOutcome, str]:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                code = int(pytest.main([*OPTIONS, *tests.split()]))
            finally:  # whatever happens, a fork must not go on with the session
                os._exit(code)
        end_s = time.monotonic() + timeout
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > end_s:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return mutating.TestOutcome.KILLED, "timeout"
            time.sleep(0.01)
        return mutating.TestOutcome.KILLED if ended[1] else mutating.TestOutcome.SURVIVED, ""

    mutating.run_tests = forked
    with use_db(session, WorkDB.Mode.open) as database:
        for item in list(database.pending_work_items):
            database.set_result(item.job_id, mutating.mutate_and_test(item.mutations, "", timeout_s))


def survivors(folder: Path) -> Iterator[str]:
    """A line for each mutant that passed all tests: where it is, what was changed, and the changed line."""
    command = [sys.executable, "-m", "cosmic_ray.cli", "dump", "session.sqlite"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    for item, result in map(json.loads, done.stdout.splitlines()):
        if result and result["test_outcome"] == "survived":
            (mutation,) = item["mutations"]
            lines = (line[1:].strip() for line in result["diff"].splitlines() if line[:1] == "+" and line[:3] != "+++")
            operator = mutation["operator_name"].removeprefix("core/")
            yield f"{mutation['start_pos'][0]} | {operator} {mutation['occurrence']} | `{' '.join(lines)}`"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python mutation/run.py", description=__doc__)
    parser.add_argument("module", choices=JOBS, nargs="*", default=list(JOBS), help="all by default, one by one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutant")
    parser.add_argument("--work", metavar="SESSION", help=argparse.SUPPRESS)  # what a job runs in its copy
    parser.add_argument("--list", action="store_true", help="print the survivors so far, run nothing")
    given = parser.parse_args()
    if given.work:
        return work(given.work, JOBS[given.module[0]], given.timeout)
    for module in given.module:
        folder = prepare(module, given.timeout)
        if not given.list:
            run(folder, "mutation.run", module, "--work", "../session.sqlite", "--timeout", str(given.timeout))
        print(f"{module}: line | mutant | the line as changed")
        print(*survivors(folder), sep="\n", flush=True)


if __name__ == "__main__":
    main()
