"""The real model, loaded once for all tests that need it."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specdec.drafts import load_with_drafts
from specdec.methods import packaged_draft
from specdec.models.causal import CausalLM
from specdec.models.loading import load_pretrained, resolve

ALL_THREADS = torch.get_num_threads()


def pytest_configure(config: pytest.Config) -> None:
    """Shuffle modules and the tests of each, so that none can rest on another; the header says by which seed.

    `--random-order-seed=N` repeats an order, `--random-order-bucket=none` is the order of the files. Not in
    pytest.ini: the cells of bench/ keep theirs.
    """
    if config.pluginmanager.hasplugin("random_order"):
        config.option.random_order_enabled = True
    elif os.environ.get("CI"):
        raise pytest.UsageError("pytest-random-order must be installed; pip install -e '.[test]'")


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
def default_model() -> CausalLM:
    """The default pair's target in float32, where equal means equal."""
    return CausalLM(*load_pretrained("smollm2-135m", dtype=torch.float32))


@pytest.fixture(scope="session")
def default_pair() -> tuple[CausalLM, dict[str, Any]]:
    """The default target as people load it, in float32, and its drafts by method."""
    names = {method: packaged_draft("smollm2-135m", method) for method in ("eagle", "draft_model", "hybrid", "tree")}
    sources = {method: resolve(name) for method, name in names.items() if name}
    options = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa", "load_format": "auto"}
    target, drafts = load_with_drafts("smollm2-135m", set(sources.values()), **options)
    return target, {method: drafts[source] for method, source in sources.items()}
