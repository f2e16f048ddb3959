"""The measurement of a load cell: requests arrive, are served, and what became of them is checked."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.campaign.options import BenchConfig
from bench.engines.base import Run, Served, ServingEngine, Setup
from bench.measure import fairness, telemetry
from bench.measure.paired import check_counts
from bench.records.schema import Cell
from specdec import SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a cell: prompts as token ids, when each arrives, and its sampling parameters."""

    prompts: Sequence[Sequence[int]]
    arrivals_s: Sequence[float]
    sampling: Sequence[SamplingParams]


@dataclass(frozen=True, slots=True)
class Measured:
    """What became of a load. rounds_s: pytest-benchmark's times. spans: when it ran. trace: of the telemetry."""

    served: Served
    rounds_s: list[float]
    spans: Sequence[telemetry.Span]
    trace: telemetry.Trace


def setup_of(cell: Cell) -> Setup:
    return Setup(cell.method, cell.gamma, cell.batch_size)


def warm_up(
    engine: ServingEngine, cell: Cell, prompts: Sequence[Sequence[int]], sampling: SamplingParams, limit_s: float
) -> float:
    """Serve prompts all at once. Returns the seconds that it took, compilation included."""
    start_s = time.perf_counter()
    engine.serve(prompts, [0.0] * len(prompts), setup_of(cell), [sampling] * len(prompts), limit_s)
    return time.perf_counter() - start_s


def measure(
    benchmark: Any, engine: ServingEngine, cell: Cell, load: Load, config: BenchConfig, meters: Mapping[str, Any]
) -> Measured:
    """Serve a load once; pytest-benchmark times it. The engine is warm."""
    spans = []

    def serve() -> Served:
        start_s = time.perf_counter()
        limit_s = config.duration + config.drain
        served = engine.serve(load.prompts, load.arrivals_s, setup_of(cell), load.sampling, limit_s)
        spans.append((start_s, time.perf_counter()))
        return served

    with telemetry.Sampler(meters, config.telemetry_hz) as sampler:
        served = benchmark.pedantic(serve, rounds=1)
    return Measured(served, list(benchmark.stats.stats.data), spans, sampler.trace)


def check(engine: ServingEngine, cell: Cell, served: Served, max_tokens: int, dtype: str) -> None:
    """Assert that the terms are those of other cells, and that what the engine says of itself adds up."""
    finished = Run(tuple(result for result in served.results if result is not None))
    assert not any(served.results[index] for index in served.refused)
    fairness.check_terms({cell.engine: engine}, dtype)
    check_counts([finished], cell.method, max_tokens)
    stops: Collection[int] = engine.stop_token_ids
    fairness.check_ends([finished], stops, max_tokens)
