"""Load cells: requests arrive over time, whether or not earlier ones are finished."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any, cast

from bench.campaign import arrivals
from bench.engines.base import Run, Served, ServingEngine, Setup
from bench.measure import acceptance, fairness, records
from bench.measure.context import WARM_UP_TOKENS, Context
from bench.measure.journal import Entry
from bench.measure.models import failing_cell
from bench.measure.paired import check_counts
from bench.measure.prompts import Batch, Encoded, source_of
from bench.records.schema import Cell
from specdec import SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a cell: prompts as token ids, when each arrives, and its sampling parameters."""

    prompts: Sequence[Sequence[int]]
    arrivals_s: Sequence[float]
    sampling: Sequence[SamplingParams]


class Loaded:
    """Measures load cells. arrivals_s: by rate, seconds from the start at which requests arrive."""

    def __init__(self, context: Context, arrivals_s: Mapping[float, Sequence[float]]) -> None:
        self._context, self._arrivals = context, arrivals_s

    def measure(self, cell: Cell, benchmark: Any) -> Entry:
        """Serve a cell's requests once, timed by pytest-benchmark; returns its record."""
        context, config = self._context, self._context.config
        pair = config.pair_of(cell)
        assert cell.rate is not None, "a load cell has a rate"
        encoded = context.chosen(cell, pair)
        trace = replay(encoded, cell.rate, config.duration)
        arrivals_s = trace or self._arrivals[cell.rate]
        encoded = encoded[: len(arrivals_s)]
        requested = list(islice(cycle(encoded), len(arrivals_s)))
        chosen, prompts = ([tokens for _, tokens in each] for each in (encoded, requested))
        sampling = config.sampling(0, len(prompts), config.max_tokens)
        if trace:
            sampling = [
                replace(params, max_tokens=prompt.max_tokens or config.max_tokens)
                for params, (prompt, _) in zip(sampling, requested, strict=True)
            ]
        load = Load(prompts, arrivals_s, sampling)
        context.models.prepare([cell], pair)
        engine = cast(ServingEngine, context.models.engine(cell.engine, pair))  # by its extras, see campaign.plan
        sampler = context.sampler(cell)
        with failing_cell(context.device):
            warm_up_s = self.warm_up(cell, engine, chosen)
            context.models.settle()
            with sampler:
                served, span = benchmark.pedantic(partial(self._serve, cell, engine, load), rounds=1)
            context.models.settle()
        check(engine, cell, served, [params.max_tokens for params in sampling], config.dtype_of(pair))
        record = records.build_load(cell, pair, config, engine.version, context.device, served, arrivals_s)
        record |= acceptance.by_text(requested, served.results, "per_request") | source_of(requested)
        record |= {"arrivals": "trace"} if trace else {}
        record |= {"num_prompts": len(chosen), "warm_up_time_s": warm_up_s}
        record |= context.prompts.rows_left_out(cell) | context.telemetry_fields(record, sampler.trace, [span])
        return Entry(record, list(benchmark.stats.stats.data))

    def warm_up(self, cell: Cell, engine: ServingEngine, prompts: Batch) -> float:
        """Serve the longest prompt in every slot; on a GPU, which captures graphs by shape, also all prompts twice.

        Returns the seconds that it took, compilation included.
        """
        start_s = time.perf_counter()
        self._serve_at_once(cell, engine, [max(prompts, key=len)] * cell.batch_size, WARM_UP_TOKENS)
        if self._context.device.startswith("cuda"):
            self._serve_at_once(cell, engine, 2 * prompts, self._context.config.max_tokens)
        return time.perf_counter() - start_s

    def _serve_at_once(self, cell: Cell, engine: ServingEngine, prompts: Batch, max_tokens: int) -> None:
        sampling = self._context.config.sampling(0, 1, max_tokens) * len(prompts)
        self._serve(cell, engine, Load(prompts, [0.0] * len(prompts), sampling))

    def _serve(self, cell: Cell, engine: ServingEngine, load: Load) -> tuple[Served, tuple[float, float]]:
        """Serve the requests; returns the outcome and the time span by time.perf_counter."""
        config, setup = self._context.config, Setup(cell.method, cell.gamma, cell.batch_size)
        start_s = time.perf_counter()
        served = engine.serve(load.prompts, load.arrivals_s, setup, load.sampling, config.duration + config.drain)
        return served, (start_s, time.perf_counter())


def replay(encoded: Sequence[Encoded], rate: float, duration_s: float) -> tuple[float, ...] | None:
    """When the requests of a trace arrive at a mean rate; None for prompts without arrivals."""
    times = [prompt.arrival_s for prompt, _ in encoded if prompt.arrival_s is not None]
    return arrivals.replayed(times, rate, duration_s) if times else None


def check(engine: ServingEngine, cell: Cell, served: Served, max_tokens: Sequence[int], dtype: str) -> None:
    """Assert that the cell is comparable with others, and that the engine's counters are consistent.

    max_tokens: of each request.
    """
    assert not any(served.results[index] for index in served.refused)
    fairness.check_terms({cell.engine: engine}, dtype)
    for result, longest in zip(served.results, max_tokens, strict=True):
        runs = [Run((result,))] if result is not None else []
        check_counts(runs, cell.method, longest)
        fairness.check_ends(runs, engine.stop_token_ids, longest)
