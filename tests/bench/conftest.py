"""Shared by the tests of the harness."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.campaign.options import BenchConfig
from bench.catalogue.pairs import catalogue


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For a run of pytest inside this one: without what would change its options or tell it of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SPECDEC_", "PYTEST_"))}


@pytest.fixture
def make_config() -> Callable[..., BenchConfig]:
    """A small configuration, with changes given by keyword."""
    config = BenchConfig(
        engines=("specdec", "transformers"),
        pairs=(catalogue()["tiny-random"],),
        methods=("autoregressive", "draft_model"),
        gammas=(2, 4),
        placements=("same",),
        workloads=("smoke",),
        data_dir=None,
        malformed="refuse",
        prompt_format="instruct",
        prompt_lengths=(),
        allow_code_execution=False,
        num_prompts=4,
        max_tokens=8,
        batch_sizes=(1,),
        rate=(),
        duration=30.0,
        arrivals="poisson",
        drain=60.0,
        ttft_limit=2.0,
        inter_token_limit=0.2,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        seed=0,
        dtype="auto",
        device="cpu",
        verification="token",
        synthetic_acceptance_rates=(),
        vllm_python=None,
        vllm_options="{}",
        server_url=None,
        num_draws=1000,
        max_tv=0.05,
        certificates=Path("certificates"),
        telemetry_hz=0.0,
        quantisation="none",
        shard=None,
        journal=Path("journal"),
        resume=False,
        smoke=False,
    )
    return lambda **changes: dataclasses.replace(config, **changes)
