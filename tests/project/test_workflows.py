"""Hosted workflows and hooks: they parse, and run the documented commands."""

from __future__ import annotations

import configparser
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from specdec.conformance.__main__ import parser as conformance_parser

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[str, Any]:
    """A YAML file; without types, for `on` would be true."""
    loaded: dict[str, Any] = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    return loaded


def commands(path: Path) -> list[str]:
    """Command lines of all steps."""
    steps = [step for job in read(path)["jobs"].values() for step in job["steps"]]
    return [line.strip() for step in steps for line in step.get("run", "").splitlines()]


def test_there_are_workflows_for_tests_for_a_gpu_and_for_audits() -> None:
    assert [path.name for path in WORKFLOWS] == ["audit.yml", "gpu.yml", "tests.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_each_job_names_its_runner_and_each_step_does_one_thing(path: Path) -> None:
    workflow = read(path)
    assert workflow["on"]
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_versions_of_python_are_those_that_the_project_declares() -> None:
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    declared = [match[1] for each in classifiers if (match := re.search(r":: (3\.\d+)$", each))]
    assert read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"] == {
        "python": declared
    }


def test_hosted_lint_is_that_of_tox_and_of_the_hooks() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    lint = tox["testenv:lint"]["commands"].split("\n")[1:]
    assert lint == ["ruff check .", "ruff format --check .", "mypy"]
    assert set(lint) <= set(commands(ROOT / ".github" / "workflows" / "tests.yml"))
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == ["ruff check --fix", "ruff format", "mypy"]


def test_the_gpu_runs_the_two_commands_and_compares_with_a_baseline() -> None:
    run = commands(ROOT / ".github" / "workflows" / "gpu.yml")
    assert "pytest tests/" in run
    assert any(line.startswith("pytest bench/ --benchmark-json=out.json") for line in run)
    assert any(re.match(r'pytest-benchmark compare "\$BASELINE" out\.json ', line) for line in run)


def test_the_audit_workflow_can_be_called_and_fails_with_the_audit() -> None:
    path = ROOT / ".github" / "workflows" / "audit.yml"
    (call,) = read(path)["on"].items()
    assert call[0] == "workflow_call"
    inputs = call[1]["inputs"]
    assert {name for name, each in inputs.items() if each.get("required")} == {
        *("install", "target", "speculative", "plain"),
    }
    (step,) = [step for step in read(path)["jobs"]["audit"]["steps"] if step.get("name") == "Audit"]
    assert step["shell"] == "bash"
    command = step["run"].replace("\\\n", " ").splitlines()[-1].partition("|")[0]
    words = shlex.split(command.replace('"${options[@]}"', "--max-tv 0.1"))
    assert words[1:3] == ["-m", "specdec.conformance"]
    assert conformance_parser().parse_args(words[3:])


def test_what_the_documentation_says_of_it_fits() -> None:
    page = (ROOT / "docs" / "auditing.md").read_text()
    job = yaml.load(re.search(r"```text\n(jobs:.*?)```", page, re.S)[1], Loader=yaml.BaseLoader)["jobs"]["lossless"]
    assert (ROOT / job["uses"]).is_file()
    assert set(job["with"]) <= set(read(ROOT / job["uses"])["on"]["workflow_call"]["inputs"])
