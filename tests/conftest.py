"""How tests/ runs: shuffled, file by file on a worker per core; and the real model, loaded once by each worker."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from specdec.models.causal import CausalLM  # imports transformers, for which the process that starts workers waits
    from specdec.models.loading import Vocabulary

ALL_THREADS = max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
FEW_TESTS = 20
MAX_WORKERS = 8  # each that meets the real model holds up to 4 GB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute the files of a folder over one worker per core. `-n N` sets their number; `-n 0` starts none.

    Not in pytest.ini: the cells of bench/ are measured one at a time.
    """
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = str(ALL_THREADS)  # of the processes that tests start
        del os.environ["PYTEST_XDIST_WORKER"]  # or else pytest-benchmark measures nothing, here and in those processes
    elif config.pluginmanager.hasplugin("xdist"):
        _distribute(config.option, is_folder=any(Path(argument).is_dir() for argument in config.args))
    elif os.environ.get("CI"):
        raise pytest.UsageError("pytest-xdist must be installed; pip install -e '.[test]'")


def _distribute(option: Any, *, is_folder: bool) -> None:
    """Leave xdist's options as they are if one was given, and start no workers for a debugger or a single file."""
    if is_folder and option.numprocesses is None and option.dist == "no" and not (option.usepdb or option.collectonly):
        option.numprocesses, option.maxprocesses = "logical", option.maxprocesses or MAX_WORKERS
        option.dist = "loadfile"
    option.loadscopereorder = False  # keeps the shuffled order of the files


def pytest_configure(config: pytest.Config) -> None:
    """Shuffle modules and the tests of each, so that none can depend on another; the header shows the seed.

    `--random-order-seed=N` repeats an order, `--random-order-bucket=none` is the order of the files. Not in
    pytest.ini: the cells of bench/ keep their order.
    """
    if config.pluginmanager.hasplugin("random_order"):
        config.option.random_order_enabled = True
    elif os.environ.get("CI"):
        raise pytest.UsageError("pytest-random-order must be installed; pip install -e '.[test]'")
    # no deadline: the machine may be busy. derandomize: CI shows the same examples to everybody
    settings.register_profile("dev", deadline=None, max_examples=100)
    settings.register_profile("ci", deadline=None, max_examples=200, derandomize=True, print_blob=True)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let workers begin with the files of slow tests and end with those of few: the others wait for the last one."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        numbers = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path not in slow, numbers[item.path] < FEW_TESTS))


def pytest_collection_finish() -> None:
    """Keep the million objects of torch, transformers and the test modules out of each later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start each test, its fixtures included, from one state of torch's generator, in any order.

    Not seed 0, by which dummy weights are drawn: a random model of a test must differ from them.
    """
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for toys, whose operations are too small to share; all of them for the real model."""
    is_real = {"default_model", "default_pair"} & set(request.fixturenames)
    torch.set_num_threads(ALL_THREADS if is_real else 1)
    yield
    torch.set_num_threads(ALL_THREADS)


@pytest.fixture(scope="session")
def default_vocabulary() -> Vocabulary:
    """The vocabulary and tokenizer of the default pair, for tests that need no weights."""
    from specdec.models.loading import read_vocabulary

    return read_vocabulary("smollm2-135m")


@pytest.fixture(scope="session")
def default_model() -> CausalLM:
    """The default pair's target in float32, where equal means equal."""
    from specdec.models.causal import CausalLM
    from specdec.models.loading import load_pretrained

    return CausalLM(*load_pretrained("smollm2-135m", dtype=torch.float32))


@pytest.fixture(scope="session")
def default_pair() -> tuple[CausalLM, dict[str, Any]]:
    """The default target as `Engine.load` loads it, in float32, and its drafts by method."""
    from specdec.drafts import load_with_drafts
    from specdec.methods import packaged_draft
    from specdec.models.loading import resolve

    names = {method: packaged_draft("smollm2-135m", method) for method in ("eagle", "draft_model", "hybrid", "tree")}
    sources = {method: resolve(name) for method, name in names.items() if name}
    options = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa", "load_format": "auto"}
    target, drafts = load_with_drafts("smollm2-135m", set(sources.values()), **options)
    return target, {method: drafts[source] for method, source in sources.items()}
