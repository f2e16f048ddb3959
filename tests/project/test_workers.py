"""How `pytest tests/` is distributed over processes: on every core, or as requested on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CONFTEST = str(Path(__file__).parents[1] / "conftest.py")
UNSET = {"numprocesses": None, "maxprocesses": None, "dist": "no", "usepdb": False, "collectonly": False}


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> Any:
    """The plugin that is tests/conftest.py."""
    (found,) = (
        each for each in request.config.pluginmanager.get_plugins() if getattr(each, "__file__", "") == CONFTEST
    )
    return found


def distributed(conftest: Any, is_folder: bool = True, **given: Any) -> tuple[Any, Any]:
    option = SimpleNamespace(**UNSET | given)
    conftest._distribute(option, is_folder=is_folder)
    assert option.loadscopereorder is False  # or files would run in the order of their sizes
    return option.numprocesses, option.dist


def test_a_folder_runs_file_by_file_on_every_core(conftest: Any) -> None:
    assert distributed(conftest) == ("logical", "loadfile")


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_number_of_workers_wins(conftest: Any, number: int) -> None:
    assert distributed(conftest, numprocesses=number) == (number, "no")  # xdist derives its own default from the number


def test_a_way_of_distributing_wins(conftest: Any) -> None:
    assert distributed(conftest, dist="worksteal") == (None, "worksteal")


@pytest.mark.parametrize("given", [{"usepdb": True}, {"collectonly": True}, {"is_folder": False}], ids=str)
def test_a_debugger_a_listing_and_single_files_need_no_workers(conftest: Any, given: dict[str, bool]) -> None:
    assert distributed(conftest, **given) == (None, "no")


def test_subprocesses_of_tests_are_no_xdist_workers(monkeypatch: pytest.MonkeyPatch, conftest: Any) -> None:
    """pytest-benchmark measures nothing in workers; the cores are shared with the other workers."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw7")
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    conftest.pytest_cmdline_main(SimpleNamespace(workerinput={}))
    assert "PYTEST_XDIST_WORKER" not in os.environ
    assert os.environ["OMP_NUM_THREADS"] == str(conftest.ALL_THREADS)
