"""Mutate a module, one small change at a time, and list the changes that no test sees; see README.md beside this.

A run can be interrupted and goes on where it stopped: cosmic-ray keeps what is done in a session file. The changes are
made in a copy of the tree, under build/mutation, never in the sources.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from mutation import verdicts

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutation"
ENUMERATION = "tests/conformance/test_enumeration.py::test_"
JOBS = {  # module -> the tests that are to see its mutants
    "specdec/stats.py": "tests/test_stats.py",
    "specdec/verification.py": (
        "tests/verification/test_verification.py tests/verification/test_block_verification.py "
        "tests/verification/test_coupled_verification.py::test_the_draft_is_accepted_while_the_target_samples_the_same "
        "tests/verification/test_coupled_verification.py::test_greedy_rows_need_no_noise"
    ),
    "specdec/trees/verification.py": "tests/trees/test_trees.py",
    "specdec/sampling/state.py": "tests/sampling/test_sampling.py tests/sampling/test_declared_distributions.py",
    "specdec/sampling/distributions.py": "tests/sampling/test_sampling.py tests/verification/test_verification.py",
    "specdec/proposers/adaptive.py": "tests/proposers/test_adaptive.py",
    "specdec/conformance/verdicts.py": (
        "tests/conformance/test_verdicts.py tests/conformance/test_audit.py::test_limits_are_probabilities "
        "tests/conformance/test_audit.py::test_noise_is_not_negative"
    ),
    "specdec/conformance/audit.py": (
        "tests/conformance/test_audit_steps.py tests/conformance/test_expectation.py::test_it_is_measured "
        "tests/conformance/test_expectation.py::test_greedy_audits_use_each_prompt_once"
    ),
    "specdec/conformance/arms.py": "tests/conformance/test_arms.py",
    "specdec/conformance/statistics/betting.py": "tests/conformance/test_betting.py tests/conformance/test_verdicts.py",
    "specdec/conformance/statistics/instruments.py": "tests/conformance/test_instruments.py",
    "specdec/conformance/statistics/facts.py": "tests/conformance/test_facts.py",
    "specdec/conformance/reference.py": (
        "tests/conformance/test_reference.py "
        "--deselect tests/conformance/test_reference.py::test_a_reference_is_loaded_by_its_name"
    ),
    "specdec/conformance/certificate.py": "tests/conformance/test_certificate.py",
    "specdec/conformance/enumeration.py": (
        "tests/conformance/test_oracle.py "
        f"{ENUMERATION}races_over_pieces_have_the_distributions_exactly "
        f"{ENUMERATION}pieces_between_thresholds "
        f"{ENUMERATION}joint_distribution_of_the_recorded_coupled_loop"
    ),
    "bench/measure/records.py": (
        "tests/bench/measure/test_records.py tests/bench/measure/test_loaded.py::test_a_record_by_hand "
        "tests/bench/measure/test_loaded.py::test_an_engine_that_tells_less_has_nulls_and_its_mean_wait "
        "tests/bench/measure/test_loaded.py::test_nothing_finished_is_a_record_of_a_cell_that_stalled"
    ),
    "bench/records/intervals.py": ("tests/bench/records/test_intervals.py tests/bench/analysis/test_run_diff.py"),
    "bench/analysis/run_diff.py": "tests/bench/analysis/test_run_diff.py",
    "bench/workloads/scoring/extraction.py": "tests/bench/workloads/test_extraction.py",
}
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


def forget_survivors(folder: Path, module: str) -> None:
    """Let the survivors run again that are not equivalent or accepted, with the tests as they are now."""
    for name in ("tests", "mutation"):
        shutil.copytree(ROOT / name, folder / "tree" / name, dirs_exist_ok=True)
    settled = verdicts.settled(module)
    survived = "SELECT job_id, operator_name, occurrence FROM work_results JOIN mutation_specs USING (job_id) "
    survived += "WHERE test_outcome = 'SURVIVED'"
    with closing(sqlite3.connect(folder / "session.sqlite")) as session, session:
        jobs = [job for job, operator, number in session.execute(survived) if _name(operator, number) not in settled]
        session.executemany("DELETE FROM work_results WHERE job_id = ?", [(job,) for job in jobs])


def cosmic_ray(folder: Path, verb: str, *arguments: str) -> None:
    run(folder, "cosmic_ray.cli", verb, "../config.toml", *(f"../{each}" for each in arguments))


def run(folder: Path, module: str, *arguments: str) -> None:
    """Run a Python module in the copy of the tree."""
    tree = folder / "tree"
    environment = {**os.environ, "PYTHONPATH": str(tree)}  # an installed copy would be tested unmutated
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=tree, env=environment, check=True)


def results(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each mutant with its result, None if it has not been run; without those that the filter left out."""
    command = [sys.executable, "-m", "cosmic_ray.cli", "dump", "session.sqlite"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    pairs = map(json.loads, done.stdout.splitlines())
    return [(item, result) for item, result in pairs if not result or result["worker_outcome"] != "skipped"]


def counts(mutants: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> tuple[int, int, int]:
    """How many mutants there are, have been run, and took too long."""
    run = [result for _, result in mutants if result]
    return len(mutants), len(run), sum(result["output"] == "timeout" for result in run)


def survivors(mutants: list[tuple[dict[str, Any], dict[str, Any] | None]]) -> list[str]:
    """A table row for each survivor; verdicts are added by hand."""
    survived = [(item, result) for item, result in mutants if result and result["test_outcome"] == "survived"]
    return sorted((_row(item["mutations"][0], result["diff"]) for item, result in survived), key=verdicts.line_number)


def _row(mutation: dict[str, Any], diff: str) -> str:
    added = (line[1:].strip() for line in diff.splitlines() if line[:1] == "+" and line[:3] != "+++")
    changed = " ".join(added).replace("|", "\\|")
    name = _name(mutation["operator_name"], mutation["occurrence"])
    return f"| {mutation['start_pos'][0]} | {name} | `{changed}` | |"


def _name(operator: str, occurrence: int) -> str:
    return f"{operator.removeprefix('core/')} {occurrence}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutation.run", description=__doc__)
    parser.add_argument("module", nargs="*", help="all by default, one by one")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for the tests of one mutant")
    parser.add_argument("--sample", type=int, help="run only so many mutants of a module, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; mutants run in a random order anyway")
    parser.add_argument("--work", metavar="SESSION", help=argparse.SUPPRESS)  # what a job runs in its copy
    parser.add_argument("--list", action="store_true", help="print the table of survivors so far, run nothing")
    parser.add_argument("--again", action="store_true", help="run wanted survivors again, with the tests of now")
    parser.add_argument("--write", action="store_true", help="add the survivors to survivors/, for verdicts by hand")
    parser.add_argument("--summary", action="store_true", help="count survivors/ for README.md's table, run nothing")
    given = parser.parse_args()
    if unknown := set(given.module) - JOBS.keys():
        parser.error(f"module {', '.join(unknown)} must be one of {', '.join(JOBS)}")
    if given.summary:
        return verdicts.summarize(JOBS)
    if given.work:
        from mutation.worker import work  # imports what the tests import, from the copy

        (module,) = given.module
        return work(given.work, module, JOBS[module].split(), given.timeout, given.sample, given.seed)
    for module in given.module or JOBS:
        folder = prepare(module, given.timeout)
        if given.again:
            forget_survivors(folder, module)
        if not given.list:
            options = ["--timeout", str(given.timeout), "--seed", str(given.seed)]
            options += ["--sample", str(given.sample)] if given.sample is not None else []
            run(folder, "mutation.run", module, "--work", "../session.sqlite", *options)
        mutants = results(folder)
        total, run_, late = counts(mutants)
        rows = survivors(mutants)
        print(f"# {module}\n\n{total} mutants, {run_} run, {late} timed out, {len(rows)} survived.\n")
        print(*verdicts.HEAD, *rows, sep="\n", flush=True)
        if given.write:
            verdicts.update(module, (total, run_, late), rows)


if __name__ == "__main__":
    main()
