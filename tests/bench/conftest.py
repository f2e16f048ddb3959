"""Fixtures for the tests of the harness."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest

from bench.campaign.config import BenchConfig
from bench.campaign.options import build


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment for a run of pytest inside this one, without variables that would change its options."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SPECDEC_", "PYTEST_"))}


@pytest.fixture
def make_config() -> Callable[..., BenchConfig]:
    """A small configuration, with changes given by keyword."""
    given = {"pairs": "tiny-random", "engines": "specdec,transformers", "methods": "autoregressive,draft_model"}
    given |= {"gammas": "2,4", "workloads": "smoke", "num_prompts": "4", "max_tokens": "8", "device": "cpu"}
    given |= {"num_draws": "1000", "telemetry_hz": "0"}
    config = dataclasses.replace(build(given), named=frozenset())
    return lambda **changes: dataclasses.replace(config, **changes)
