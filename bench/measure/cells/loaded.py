"""Load cells: requests arrive over time, at a rate or from clients that wait for their answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import pytest

from bench.campaign import arrivals
from bench.campaign.arrivals import Order
from bench.engines.base import Run, Served, ServingEngine, Setup
from bench.measure import acceptance, fairness, records
from bench.measure.context import WARM_UP_TOKENS, Context
from bench.measure.journal import Entry
from bench.measure.load import Window
from bench.measure.models import failing_cell
from bench.measure.paired import check_counts
from bench.measure.prompts import Batch, Encoded, source_of
from bench.records.schema import Cell
from specdec import SamplingParams


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a cell with their sampling parameters. arrivals_s, after: as `ServingEngine.serve` takes them."""

    requests: Sequence[Encoded]
    arrivals_s: Sequence[float]
    after: Sequence[int | None]
    sampling: Sequence[SamplingParams]

    @property
    def prompts(self) -> Batch:
        return [tokens for _, tokens in self.requests]


class Loaded:
    """Measures load cells. arrivals_s: by rate, seconds from the start at which requests or conversations arrive."""

    def __init__(self, context: Context, arrivals_s: Mapping[float, Sequence[float]]) -> None:
        self._context, self._arrivals = context, arrivals_s

    def measure(self, cell: Cell, benchmark: Any) -> Entry:
        """Serve a cell's requests once, timed by pytest-benchmark; returns its record."""
        context, config = self._context, self._context.config
        pair = config.pair_of(cell)
        load, is_trace = self._load(cell, context.chosen(cell, pair))
        context.models.prepare([cell], pair)
        engine = cast(ServingEngine, context.models.engine(cell.engine, pair))  # by its extras, see campaign.plan
        sampler = context.sampler(cell)
        with failing_cell(context.device):
            warm_up_s = self.warm_up(cell, engine, list(dict.fromkeys(load.prompts)))
            context.models.settle()
            with sampler:
                served, span = benchmark.pedantic(partial(self._serve, cell, engine, load), rounds=1)
            context.models.settle()
        load, served = arrived(load, served)
        self._check_window(cell, load)
        check(engine, cell, served, [params.max_tokens for params in load.sampling], config.dtype_of(pair))
        numbers = acceptance.conversations(load.requests)
        record = records.build_load(
            cell, pair, config, engine.version, context.device, served, load.arrivals_s, numbers
        )
        record |= acceptance.by_text(load.requests, served.results, "per_request") | source_of(load.requests)
        record |= {"arrivals": "trace"} if is_trace else {}
        record |= {"num_prompts": len(set(load.prompts)), "warm_up_time_s": warm_up_s}
        record |= context.prompts.rows_left_out(cell) | context.telemetry_fields(record, sampler.trace, [span])
        return Entry(record, list(benchmark.stats.stats.data))

    def _load(self, cell: Cell, encoded: Sequence[Encoded]) -> tuple[Load, bool]:
        """The requests of a cell, and whether they are those of a trace."""
        config = self._context.config
        trace = replay(encoded, cell.rate, config.duration) if cell.rate is not None else None
        order = self._order(cell, encoded, trace)
        requests = [encoded[number] for number in order.prompts]
        sampling = config.sampling(0, len(requests), config.max_tokens)
        if trace:
            sampling = [
                replace(params, max_tokens=prompt.max_tokens or config.max_tokens)
                for params, (prompt, _) in zip(sampling, requests, strict=True)
            ]
        return Load(requests, order.arrivals_s, order.after, sampling), trace is not None

    def _order(self, cell: Cell, encoded: Sequence[Encoded], trace: Sequence[float] | None) -> Order:
        think_time_s = self._context.config.think_time
        conversations = _conversations(encoded)
        if cell.concurrency is not None:
            return arrivals.closed_loop(cell.concurrency, conversations, think_time_s)
        assert cell.rate is not None, "a load cell has a rate or a number of clients"
        return arrivals.open_loop(trace or self._arrivals[cell.rate], conversations, think_time_s)

    def _check_window(self, cell: Cell, load: Load) -> None:
        """Fail the cell if no request arrived within the steady window."""
        window = Window(*self._context.config.window_s)
        if not any(at in window for at in load.arrivals_s):
            pytest.fail(
                f"duration={self._context.config.duration:g} must bring a request between {window.start_s:g} and "
                f"{window.end_s:g} s of {cell.id}, but none arrived; raise --duration, or widen --steady-window",
                pytrace=False,
            )

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
        config = self._context.config
        sampling = config.sampling(0, 1, max_tokens) * len(prompts)
        setup, limit_s = Setup(cell.method, cell.gamma, cell.batch_size), config.duration + config.drain
        engine.serve(prompts, [0.0] * len(prompts), setup, sampling, limit_s)

    def _serve(self, cell: Cell, engine: ServingEngine, load: Load) -> tuple[Served, tuple[float, float]]:
        """Serve the requests; returns the outcome and the time span by time.perf_counter."""
        config, setup = self._context.config, Setup(cell.method, cell.gamma, cell.batch_size)
        start_s = time.perf_counter()
        limit_s, until_s = config.duration + config.drain, config.duration
        served = engine.serve(
            load.prompts, load.arrivals_s, setup, load.sampling, limit_s, after=load.after, until_s=until_s
        )
        return served, (start_s, time.perf_counter())


def arrived(load: Load, served: Served) -> tuple[Load, Served]:
    """The requests that arrived while others did, in the order of their arrival, and their results."""
    times_s = served.arrivals_s or load.arrivals_s
    order = sorted((at, index) for index, at in enumerate(times_s) if at is not None)
    indices, arrivals_s = [index for _, index in order], [at for at, _ in order]
    requests = Load(
        [load.requests[index] for index in indices], arrivals_s, (), [load.sampling[index] for index in indices]
    )
    refused = frozenset(place for place, index in enumerate(indices) if index in served.refused)
    results = tuple(served.results[index] for index in indices)
    return requests, replace(served, results=results, refused=refused, arrivals_s=tuple(arrivals_s))


def _conversations(encoded: Sequence[Encoded]) -> list[list[int]]:
    """The numbers of the prompts of each conversation; later turns come right after earlier ones."""
    found: list[list[int]] = []
    for number, (prompt, _) in enumerate(encoded):
        if prompt.earlier and found and encoded[found[-1][-1]][0].opening == prompt.opening:
            found[-1].append(number)
        else:
            found.append([number])
    return found


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
