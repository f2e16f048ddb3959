"""A run of 1,000 prompts keeps memory flat, in the engine and in the harness around it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import catalogue
from bench.engines.base import LoadOptions
from bench.engines.specdec import SpecdecEngine, load
from bench.measure.session import Session
from specdec import SamplingParams

NUM_PROMPTS, NUM_WARM = 1000, 200  # the allocator has settled by then
GIVEN_BACK_AT = 100  # when what earlier tests freed goes back to the system, or a leak would first fill that
MAX_GROWTH = 4e6  # bytes over 800 prompts, so 5 kB a prompt; seen: under 0.2 MB
LEAK = 20_000  # bytes a prompt of a run that leaks: four times as much
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to read memory")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Have the allocator return what is free in its heaps, where it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


class Growth:
    """Resident memory after each prompt. leak: bytes that are kept for each of them, written to and so resident."""

    def __init__(self, leak: int = 0) -> None:
        self.sizes: list[int] = []
        self._leak, self._kept = leak, list[bytearray]()

    def note(self) -> None:
        if len(self.sizes) == GIVEN_BACK_AT:
            give_back()
        self._kept.append(bytearray(os.urandom(self._leak)))
        self.sizes.append(resident())

    @property
    def bytes(self) -> int:
        assert len(self.sizes) >= NUM_PROMPTS
        return max(self.sizes[NUM_WARM:NUM_PROMPTS]) - self.sizes[NUM_WARM - 1]


@pytest.fixture(scope="module")
def engine() -> SpecdecEngine:
    return load(catalogue()["tiny-random"], LoadOptions("float32", "cpu"))


@pytest.mark.parametrize(
    ("method", "leak"), [pytest.param("hybrid", 0, id="flat"), pytest.param("ngram", LEAK, id="a leak is seen")]
)
def test_a_thousand_prompts_keep_the_engine_flat(method: Any, leak: int, engine: SpecdecEngine) -> None:
    growth = Growth(leak)
    prompts = [[1 + n % 50, 2 + n // 50, 3, 4, 1 + n % 50] * 3 for n in range(NUM_PROMPTS)]
    for _ in engine._engine(method, 2, 8).as_completed(prompts, GREEDY):
        growth.note()
    assert (growth.bytes > MAX_GROWTH) == bool(leak), f"grew by {growth.bytes / 1e6:.1f} MB"


@pytest.fixture
def session(make_config: Callable[..., BenchConfig], tmp_path: Path) -> Iterator[Session]:
    prompts = tmp_path / "thousand.txt"
    prompts.write_text("".join(f"number {n}\n" for n in range(NUM_PROMPTS)))
    config = make_config(
        engines=("specdec",),
        methods=("autoregressive",),
        workloads=(str(prompts),),
        num_prompts=NUM_PROMPTS,
        max_tokens=2,
        telemetry_hz=10.0,
        journal=tmp_path / "journal.jsonl",
    )
    with closing(Session(config)) as session:
        session.open()
        yield session


def test_a_thousand_prompts_keep_the_harness_flat(
    session: Session, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    growth, generate = Growth(), SpecdecEngine.generate

    def noted(self: SpecdecEngine, *arguments: Any) -> Any:
        growth.note()
        return generate(self, *arguments)

    monkeypatch.setattr(SpecdecEngine, "generate", noted)
    record = session.run("cells", session.plans[0].cell, benchmark)
    assert (record["num_prompts"], len(growth.sizes)) == (NUM_PROMPTS, NUM_PROMPTS + 1)  # and a warm-up
    assert growth.bytes <= MAX_GROWTH, f"grew by {growth.bytes / 1e6:.1f} MB"
