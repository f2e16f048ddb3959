"""Try the mutants of a session in one process that has collected the tests once: each in a fork, in place if possible.

A mutant that changes functions only is made by replacing their code, and only tests that run a line of them are run.
For any other one the module is imported anew, in a fork of a process that has not imported it, and all tests are run.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import importlib.util
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import coverage
import pytest
from hypothesis import Phase, settings

from mutation import patching
from mutation.forks import Answer, Zygote, in_fork

LAST_KILLERS = 8  # tests that failed last are run first: neighboring mutants tend to fail the same one
MAX_EXAMPLES = 25
OPTIONS = ("-q", "-x", "-s", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


class QuickestFirst:
    """A pytest plugin that orders tests: the last ones to fail, then by how long each takes, quickest first.

    Without a time a test counts as instant, so that it is timed. `killed_by` has the test that failed.
    """

    def __init__(self, times_s: dict[str, float], last_killers: list[str]) -> None:
        self.times_s, self._last_killers, self.killed_by = times_s, last_killers, ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.sort(items)

    def sort(self, items: list[pytest.Item]) -> None:
        rank = {name: number for number, name in enumerate(self._last_killers)}
        items.sort(key=lambda item: (rank.get(item.nodeid, len(rank)), self.times_s.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.times_s[report.nodeid] = self.times_s.get(report.nodeid, 0.0) + report.duration
        if report.failed and not self.killed_by:
            self.killed_by = report.nodeid


class ShortSearches:
    """A pytest plugin that shortens Hypothesis's searches: fewer examples, and an end at the first failure.

    Nobody reads the example of a mutant, and one that survives fewer examples is looked at by hand.
    """

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        options = {"max_examples": MAX_EXAMPLES, "phases": phases, "report_multiple_bugs": False}
        settings.register_profile("mutation", settings.default, **options)
        settings.load_profile("mutation")


class LinesByTest:
    """A pytest plugin that records which lines of a module each test runs.

    A line that runs in the set-up of a shared fixture counts for all tests that use it, and one in a cached function
    for all tests that call it. Lines that run at import have the name "".
    """

    def __init__(self, path: Path, module: str) -> None:
        self._path, self._module, self._test = str(path), module, ""
        self._coverage = coverage.Coverage(data_file=None, config_file=False, include=[self._path])
        self._coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, bool, bool]:
        module = sys.modules.get(self._module)
        for each in vars(module).values() if module else ():
            if isinstance(each, functools._lru_cache_wrapper):
                each.cache_clear()
        self._test = item.nodeid
        self._coverage.switch_context(item.nodeid)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        self._coverage.switch_context(f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._coverage.switch_context(self._test)

    def lines(self) -> dict[str, list[int]]:
        """The numbers of the lines that each test, or the set-up of each shared fixture, has run."""
        self._coverage.stop()
        lines = defaultdict(list)
        for line, names in self._coverage.get_data().contexts_by_lineno(self._path).items():
            for name in names:
                lines[name].append(line)
        return dict(lines)


class MutantLoop:
    """A pytest plugin that tries mutants instead of running the collected tests; `test` runs the tests of one."""

    def __init__(self, path: Path, baseline: Answer, zygote: Zygote, timeout_s: float) -> None:
        self._path, self._source = path, path.read_text(encoding="utf-8")
        self._lines = {name: set(lines) for name, lines in baseline["lines"].items()}
        self._times_s, self._killers = baseline["times_s"], list[str]()
        self._zygote, self._timeout_s = zygote, timeout_s
        self.mutants: Callable[[], None] = lambda: None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        gc.unfreeze()  # conftest.py has frozen what was imported, and gc.get_objects leaves frozen objects out
        self._items, self._functions = list(session.items), patching.functions(self._path)
        gc.freeze()
        if not self._functions:
            raise RuntimeError(f"no function of {self._path} found: each mutant would be imported anew")
        self.mutants()
        return True

    def test(self) -> Answer | None:
        """Whether the mutant on disk survives, and the test that failed; None if the tests take too long."""
        changes = patching.changes(self._source, self._path.read_text(encoding="utf-8"), self._path)
        if changes is None or not all(self._is_replaceable(change) for change in changes):
            seen = self._zygote.ask((self._times_s, self._killers))
        else:
            seen = in_fork(lambda: self._replace_and_run(changes), self._timeout_s)
        if seen and (killer := seen.get("killed_by")):
            self._killers = [killer, *(each for each in self._killers if each != killer)][:LAST_KILLERS]
        return seen

    def _is_replaceable(self, change: patching.Change) -> bool:
        has_run = patching.lines(change[0]) & self._lines.get("", set())
        return not has_run and bool(patching.find(self._functions, change))

    def _replace_and_run(self, changes: list[patching.Change]) -> Answer:
        lines = set[int]().union(*(patching.lines(before) for before, _ in changes))
        names = {name for name, run in self._lines.items() if run & lines}
        for change in changes:
            for function in patching.find(self._functions, change):
                function.__code__ = change[1]
        order = QuickestFirst(dict(self._times_s), self._killers)
        items = [item for item in self._items if names & {item.nodeid, *_fixtures(item)}]
        order.sort(items)
        return {"killed_by": _run(items, order), "num_tests": len(items)}


def _fixtures(item: pytest.Item) -> Iterator[str]:
    return (f"fixture {name}" for name in getattr(item, "fixturenames", ()))


def _run(items: list[pytest.Item], order: QuickestFirst) -> str:
    """Run collected tests up to the first failure: its name, or nothing."""
    if not items:
        return ""
    session = items[0].session
    session.config.pluginmanager.register(order)
    for item, following in zip(items, [*items[1:], None], strict=True):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if order.killed_by:
            break
    return order.killed_by


def run_unmutated(tests: list[str], path: Path, module: str) -> Answer:
    """Run all tests: whether they passed, the time and the lines of each, and the project's modules imported."""
    order, lines = QuickestFirst({}, []), LinesByTest(path, module)
    code = pytest.main([*OPTIONS, *tests], plugins=[ShortSearches(), order, lines])
    modules = sorted(name for name in sys.modules if name.partition(".")[0] in ("specdec", "bench"))
    answer = {"killed_by": order.killed_by, "times_s": order.times_s, "lines": lines.lines(), "modules": modules}
    return {"passed": code == 0, **answer}


def import_and_run(tests: list[str], times_s: dict[str, float], killers: list[str]) -> Answer:
    """Run all tests on the module that is on disk, which must not have been imported."""
    order = QuickestFirst(times_s, killers)
    code = pytest.main([*OPTIONS, *tests], plugins=[ShortSearches(), order])
    return {"killed_by": order.killed_by or ("" if code == 0 else "collection")}


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


def work(session: str, source: str, tests: list[str], timeout_s: float, sample: int | None, seed: int) -> None:
    """Try what is left of a session, in the copy of the tree."""
    import cosmic_ray.mutating as mutating
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)  # threads do not survive a fork
    path, module = Path(source).absolute(), source.removesuffix(".py").replace("/", ".")
    baseline = in_fork(lambda: run_unmutated(tests, path, module), None, quiet=False)
    if not baseline or not baseline["passed"]:
        raise SystemExit("tests of the unmutated module must pass")
    sys.dont_write_bytecode = True  # a mutant of the same second and size would be taken for the one before
    Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
    preload(baseline["modules"], module)
    loop = MutantLoop(path, baseline, Zygote(lambda request: import_and_run(tests, *request), timeout_s), timeout_s)

    def run_tests(command: str, timeout: float) -> tuple[mutating.TestOutcome, str]:
        seen = loop.test()
        killer = "timeout" if seen is None else seen.get("killed_by", "the process")
        return mutating.TestOutcome.KILLED if killer else mutating.TestOutcome.SURVIVED, killer

    mutating.run_tests = run_tests
    loop.mutants = lambda: _try_pending(session, mutating.mutate_and_test, sample, seed)
    code = pytest.main([*OPTIONS, *tests], plugins=[ShortSearches(), loop])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(code))


def _try_pending(session: str, try_mutant: Callable[..., Any], sample: int | None, seed: int) -> None:
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome

    with use_db(session, WorkDB.Mode.open) as database:
        pending = {item.job_id for item in database.pending_work_items}
        skipped = {job for job, result in database.results if result.worker_outcome == WorkerOutcome.SKIPPED}
        items = [item for item in database.work_items if item.job_id not in skipped]
        items.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        random.Random(seed).shuffle(items)
        for item in items[:sample]:
            if item.job_id in pending:
                database.set_result(item.job_id, try_mutant(item.mutations, "", 0.0))
