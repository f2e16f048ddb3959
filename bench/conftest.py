"""pytest's hooks and fixtures of the benchmarks; the work is done in the packages beside this file."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from bench.campaign import options, shards
from bench.campaign.config import LOAD, BenchConfig
from bench.measure import machine
from bench.measure.interrupts import Interrupts
from bench.measure.progress import line_below
from bench.measure.session import Session
from bench.records import results, sweeps
from bench.records.schema import CELL_FIELDS, LOAD_FIELDS, SCHEMA_VERSION, Cell, Gamma
from bench.report import chapters
from bench.report.terminal import chapter

SESSION = pytest.StashKey[Session]()
# each of these options of pytest-benchmark shows its table
OWN_TABLE = ("columns", "time_unit", "compare", "histogram", "cprofile", "verbose")


def pytest_addoption(parser: pytest.Parser) -> None:
    options.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Check everything that can be checked before tests are collected; exit code 4 for a usage error."""
    try:
        _check_plugins(config)
        config.option.benchmark_quiet |= not any(getattr(config.option, f"benchmark_{name}") for name in OWN_TABLE)
        config.stash[SESSION] = Session(options.parse_config(config))
        if not config.option.collectonly:
            _check_output(config)
            config.stash[SESSION].open(line_below(sys.stdout))
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect audits, which take minutes, unless -m asks for them, and the cells of other shards.

    With a load only load cells are run, without one none.
    """
    session = config.stash[SESSION]
    left_out = {item for item in items if _is_left_out(item, config)}
    index, number = shards.parse(session.config.shard)
    found = {item: _part(item, session.config) for item in items if item not in left_out}
    parts = {item: part for item, part in found.items() if part}
    session.cells_of_shards = [list(parts.values()).count(part) for part in range(1, number + 1)]
    left_out |= {item for item, part in parts.items() if part != index}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _is_left_out(item: pytest.Item, config: pytest.Config) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    if item.get_closest_marker("equivalence"):
        return "equivalence" not in (config.option.markexpr or "")
    is_cell = set(CELL_FIELDS) <= set(fixtures)
    return is_cell and ("rate" in fixtures) != config.stash[SESSION].config.is_load


def _part(item: Any, config: BenchConfig) -> int | None:
    """A cell's part of a campaign; None for a test that is not a cell."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if "axis" in values:  # the whole sweep, which is of the first pair
        return 1 if config.shard_by == "pair" else shards.part_of("cost", shards.parse(config.shard)[1])
    if not set(CELL_FIELDS) <= set(values):
        return None
    prefix = "equivalence-" if item.get_closest_marker("equivalence") else ""
    cell = Cell(**{name: values[name] for name in LOAD_FIELDS if name in values})
    return shards.part_of_cell(cell, config, prefix)


@pytest.hookimpl(wrapper=True)  # around pytest-benchmark's, and inside of the terminal's, which prints tables after it
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Generator[None, object, object]:
    """Let a failure to write the results end in a message: the journal has them. A shard may have no cells."""
    run = session.config.stash[SESSION]
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and len(run.cells_of_shards) > 1:
        session.exitstatus = pytest.ExitCode.OK
    try:
        return (yield)
    except OSError as error:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        run.failure = (
            f"benchmark_json={session.config.getoption('benchmark_json')} must be writable ({error.strerror}); all "
            f"finished cells are in {run.config.journal}: free space and run again with --resume"
        )
        return None


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest's own, which makes failures of what was only reported
def pytest_runtest_call() -> Generator[None, object, object]:
    """Ctrl-C ends the run, even where Python loses the exception."""
    with Interrupts():
        return (yield)


pytest_runtest_setup = pytest_runtest_teardown = pytest_runtest_call


def pytest_unconfigure(config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session:
        session.close()


def pytest_report_header(config: pytest.Config) -> str:
    session = config.stash[SESSION]
    kept_as = None if config.option.collectonly else session.journal.kept_as
    kept = f", the earlier one kept as {kept_as.name}" if kept_as else ""
    ignored = options.without_effect(session.config)
    return (
        f"specdec: {len(session.plans)} cells, {session.num_resumed} of them taken from the journal; "
        f"journal: {session.config.journal}{kept}{machine.busy()}"
        + (f"; {', '.join(ignored)} mean nothing without {LOAD}" if ignored else "")
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell."""
    if "axis" in metafunc.fixturenames:
        _parametrize_costs(metafunc)
    if not set(CELL_FIELDS) <= set(metafunc.fixturenames):
        return
    session = metafunc.config.stash[SESSION]
    parameters = {}
    names = LOAD_FIELDS if "rate" in metafunc.fixturenames else CELL_FIELDS
    is_audit = metafunc.definition.get_closest_marker("equivalence") is not None
    for each in session.plans:
        if is_audit and each.cell.method == "autoregressive":
            continue  # it is the control arm of the others
        skip = session.why_skipped(each)
        cell = each.cell if names == LOAD_FIELDS else dataclasses.replace(each.cell, rate=None, concurrency=None)
        group = f"{cell.pair}, {cell.workload}, batch size {cell.batch_size}"
        group += f", {cell.rate:g} requests/s" if cell.rate else ""
        group += f", {cell.concurrency} clients" if cell.concurrency else ""
        marks = [pytest.mark.benchmark(timer=session.clock, group=group)]
        marks += [pytest.mark.skip(reason=skip)] if skip else []
        values = [getattr(cell, name) for name in names]
        parameters[cell.id] = pytest.param(*values, id=cell.id, marks=marks)
    metafunc.parametrize(names, parameters.values())


def _parametrize_costs(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    axes = sweeps.SMOKE_SWEEPS if session.config.smoke else sweeps.SWEEPS
    parameters = [
        pytest.param(axis, size, marks=pytest.mark.benchmark(timer=session.clock, group=f"cost of {axis}"))
        for axis, sizes in axes.items()
        for size in sizes
    ]
    metafunc.parametrize(("axis", "size"), parameters)


def pytest_report_collectionfinish(config: pytest.Config, items: list[Any]) -> str:
    """Print the roofline before the times that are compared with it."""
    if config.option.collectonly or not any("axis" in item.fixturenames for item in items):
        return ""
    from bench.measure.cost import roofline

    return roofline.line(config.stash[SESSION].roofline())


@pytest.fixture(scope="session")
def session(pytestconfig: pytest.Config) -> Session:
    """The run: options, prompts, models, journal."""
    return pytestconfig.stash[SESSION]


@pytest.fixture
def cell(engine: str, pair: str, method: str, gamma: Gamma, placement: str, workload: str, batch_size: int) -> Cell:
    """The cell that the test's parameters identify."""
    return Cell(engine, pair, method, gamma, placement, workload, batch_size)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    for private in ("node", "release"):  # do not publish the host's name and kernel
        machine_info.pop(private, None)
    machine_info.update(machine.information(), versions=config.stash[SESSION].versions())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    session = config.stash[SESSION]
    for benchmark in output_json["benchmarks"]:  # --group-by must work with the cost sweep's files, too
        benchmark["params"] = {**dict.fromkeys(CELL_FIELDS), **(benchmark["params"] or {})}
    output_json["schema_version"] = SCHEMA_VERSION
    output_json["command"] = session.config.command
    output_json["configuration"] = session.configuration()
    output_json["shard"] = session.config.shard
    output_json["cells_of_shards"] = session.cells_of_shards


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if not session:
        return
    if session.failure:
        terminalreporter.write_line(f"ERROR: {session.failure}", red=True)
    if measured := [record for kind in session.records.values() for record in kind]:
        terminalreporter.section("speculative decoding")
        for line in chapter.render(chapters.chapter(results.of_records(measured), "run")):
            terminalreporter.write_line(line)


def _check_plugins(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise ValueError("pytest-benchmark must be installed and active; pip install pytest-benchmark")
    if config.getoption("dist", "no") != "no" or config.getoption("numprocesses", None):
        raise ValueError(
            f"numprocesses={config.getoption('numprocesses')} must be 0: xdist runs tests side by side "
            "and switches benchmarks off; leave out -n"
        )
    if config.getoption("benchmark_disable"):
        raise ValueError("--benchmark-disable must be left out: these tests measure; use --smoke for a quick run")


def _check_output(config: pytest.Config) -> None:
    """Check now that pytest-benchmark will be able to write its file, which it opens at the end of the run."""
    output: Path | None = config.getoption("benchmark_json")
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(output if output.exists() else folder, os.W_OK):
        raise ValueError(f"benchmark_json={output} must be a file that can be written; create its folder, or name one")
