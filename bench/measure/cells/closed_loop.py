"""Speed-up cells: a fixed number of prompts, one batch after another, by up to three arms."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bench.catalogue.pairs import Pair
from bench.engines.base import Run
from bench.engines.registry import is_running
from bench.engines.specdec import SpecdecEngine
from bench.measure import acceptance, fairness, records, telemetry
from bench.measure.context import WARM_UP_TOKENS, Context
from bench.measure.journal import Entry
from bench.measure.models import failing_cell
from bench.measure.paired import BASELINE, CANDIDATE, REFERENCE, Arm, Measurement, check_counts, measure
from bench.measure.progress import cell_bar
from bench.measure.prompts import Batch, source_of
from bench.measure.quality import scores
from bench.records.schema import Cell, Record


class ClosedLoop:
    """Measures speed-up cells. runnable: the cells of the run that are not skipped."""

    def __init__(self, context: Context, runnable: Collection[Cell]) -> None:
        self._context, self._runnable = context, frozenset(runnable)

    def measure(self, cell: Cell, benchmark: Any) -> Entry:
        """The record of a cell, whose candidate pytest-benchmark times."""
        context, config = self._context, self._context.config
        pair = config.pair_of(cell)
        chosen = context.chosen(cell, pair)
        tokens = [tokens for _, tokens in chosen]
        batches = [tokens[start : start + cell.batch_size] for start in range(0, len(tokens), cell.batch_size)]
        cells = self._arm_cells(cell)
        warm_up_s = self._warm_up(cells, pair, batches)
        measurement, trace = self._run(cell, cells, pair, batches, benchmark)
        self._check(cells, pair, measurement)
        version, conversations = context.version(cell, pair), acceptance.conversations(chosen)
        record = records.build(cell, pair, config, version, context.device, measurement, conversations)
        results = [result for run in measurement.runs[CANDIDATE] for result in run.results]
        record |= acceptance.by_text(chosen, results, "per_prompt") | source_of(chosen)
        record |= self._divergences(tokens, measurement) | {"warm_up_time_s": warm_up_s}
        tokenizer = context.models.engine(config.reference_engine, pair).tokenizer
        record |= scores.of_run(config, pair, [prompt for prompt, _ in chosen], measurement.runs, tokenizer)
        record |= context.prompts.rows_left_out(cell) | context.telemetry_fields(record, trace, measurement.spans)
        record |= context.quantization_fields(cell, pair)
        return Entry(record, measurement.rounds_s)

    def _arm_cells(self, cell: Cell) -> dict[str, Cell]:
        """The cell of each arm: the candidate, plain decoding and the reference engine, without duplicates."""
        config = self._context.config
        reference = replace(cell, engine=config.reference_engine)
        cells = {CANDIDATE: cell}
        servers, is_server = config.peers.servers, is_running(cell.engine, config.peers)
        # a running server cannot be switched to plain decoding
        if cell.method != "autoregressive" and not (is_server and servers.plain.of(cell.engine) is None):
            cells[BASELINE] = replace(cell, method="autoregressive", gamma=0)
        if cell.engine != reference.engine and reference in self._runnable and not self._lacks_draft(reference):
            cells[REFERENCE] = reference
        return cells

    def _lacks_draft(self, cell: Cell) -> bool:
        models, pair = self._context.models, self._context.config.pair_of(cell)
        return models.why_no_draft(cell.engine, cell.method, pair) is not None

    def _warm_up(self, cells: Mapping[str, Cell], pair: Pair, batches: Sequence[Batch]) -> float:
        """Decode a few tokens after the longest prompts; on a GPU, which captures graphs by shape, everything twice.

        Returns the candidate's time in seconds, including compilation.
        """
        context, durations_s = self._context, {}
        longest = max(batches, key=lambda batch: (len(batch), max(map(len, batch))))
        context.models.prepare(cells.values(), pair)
        for arm, cell in cells.items():
            start_s = time.perf_counter()
            self._generate(cell, pair, longest, 0, WARM_UP_TOKENS)
            for batch in 2 * list(batches) if context.device.startswith("cuda") else ():
                self._generate(cell, pair, batch, 0, context.config.max_tokens)
            durations_s[arm] = time.perf_counter() - start_s
        return durations_s[CANDIDATE]

    def _run(
        self, cell: Cell, cells: Mapping[str, Cell], pair: Pair, batches: Sequence[Batch], benchmark: Any
    ) -> tuple[Measurement, telemetry.Trace]:
        context = self._context
        context.models.prepare(cells.values(), pair)  # again, so that engines forget the prompts of the warm-up
        arms = {name: self._arm(arm_cell, pair, batches) for name, arm_cell in cells.items()}
        sampler = context.sampler(cell)
        with cell_bar(cell, len(batches) * len(arms), "run", context.progress) as done, sampler:

            def settle() -> None:  # after each run of an arm, untimed
                context.models.settle()
                done.update()

            measurement = measure(benchmark, arms, len(batches), settle)
        return measurement, sampler.trace

    def _arm(self, cell: Cell, pair: Pair, batches: Sequence[Batch]) -> Arm:
        max_tokens = self._context.config.max_tokens
        return lambda index: self._generate(cell, pair, batches[index], index * cell.batch_size, max_tokens)

    def _generate(self, cell: Cell, pair: Pair, batch: Batch, first: int, max_tokens: int) -> Run:
        """Decode a batch. first: index of its first prompt."""
        context = self._context
        sampling = context.config.sampling(first, len(batch), max_tokens)
        with failing_cell(context.device):
            return context.models.engine(cell.engine, pair).generate(batch, cell.method, cell.gamma, sampling)

    def _check(self, cells: Mapping[str, Cell], pair: Pair, measurement: Measurement) -> None:
        """Assert that the arms are comparable, and that their counters are consistent."""
        config = self._context.config
        engines = {cell.engine: self._context.models.engine(cell.engine, pair) for cell in cells.values()}
        fairness.check_terms(engines, config.dtype_of(pair))
        for arm, cell in cells.items():
            check_counts(measurement.runs[arm], cell.method, config.max_tokens)
            fairness.check_ends(measurement.runs[arm], engines[cell.engine].stop_token_ids, config.max_tokens)

    def _divergences(self, prompts: Batch, measurement: Measurement) -> Record:
        """Where greedy outputs diverge from the reference's, else from plain decoding's, and the target's margin there.

        The margin is computed by specdec's target; None without that engine.
        """
        config, expected = self._context.config, measurement.runs.get(REFERENCE) or measurement.runs.get(BASELINE)
        if not expected or config.temperature > 0 or config.prescribes_acceptance:
            return {"first_difference_at": None, "margin_at_difference": None}
        positions = fairness.differences(measurement.runs[CANDIDATE], expected)
        engine = self._context.models.loaded("specdec")
        target = engine.target if isinstance(engine, SpecdecEngine) else None
        return {
            "first_difference_at": positions,
            "margin_at_difference": fairness.margins(target, prompts, expected, positions) if target else None,
        }
