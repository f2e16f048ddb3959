"""The context shared by all kinds of cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TextIO

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import Pair
from bench.engines.base import BenchEngine, Setup
from bench.engines.registry import is_running
from bench.measure import machine, telemetry
from bench.measure.models import Models, failing_cell, quantization_of
from bench.measure.prompts import Encoded, Prompts
from bench.records.schema import Cell, Record

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Context:
    """A run's options, models and prompts. device: a torch device. progress: stream for progress bars."""

    config: BenchConfig
    device: str
    models: Models
    prompts: Prompts
    progress: TextIO

    def chosen(self, cell: Cell, pair: Pair) -> list[Encoded]:
        """A cell's prompts, encoded by the reference engine's tokenizer so that all engines get the same tokens."""
        engine = self.models.engine(self.config.reference_engine, pair)
        return self.prompts.chosen(cell, pair, engine.tokenizer, partial(self._answer, engine))

    def _answer(self, engine: BenchEngine, prompt: tuple[int, ...]) -> str:
        """The target's own answer: by plain decoding, so that it is the same for all engines and methods."""
        engine.prepare([Setup("autoregressive", 0, 1)])
        (sampling,) = self.config.sampling(0, 1, self.config.max_tokens)
        with failing_cell(self.device):
            run = engine.generate([prompt], "autoregressive", 0, [sampling])
        return str(engine.tokenizer.decode(run.results[0].token_ids, skip_special_tokens=True))

    def version(self, cell: Cell, pair: Pair) -> str:
        """The version of a cell's engine."""
        return self.models.engine(cell.engine, pair).version

    def sampler(self, cell: Cell) -> telemetry.Sampler:
        """The sampler of power, utilization, memory and temperature for a cell."""
        if is_running(cell.engine, self.config.peers):
            url = self.config.peers.servers.url(cell.engine, cell.method)
            reason = f"the server at {url} may be another machine"
            return telemetry.Sampler({"gpu": reason, "cpu": reason}, self.config.telemetry_hz)
        return telemetry.Sampler(telemetry.meters(machine.gpu_uuids(self.device)), self.config.telemetry_hz)

    def telemetry_fields(self, record: Record, trace: telemetry.Trace, spans: Sequence[telemetry.Span]) -> Record:
        """The telemetry fields of a cell. record: with its token counts. spans: when the candidate ran."""
        counts = record["num_tokens"], record["num_accepted"]
        return telemetry.record(trace, spans, self.config.telemetry_hz, *counts)

    def quantization_fields(self, cell: Cell, pair: Pair) -> Record:
        """How far a cell's quantized target is from the one that is not; None where nothing is quantized."""
        if quantization_of(cell, self.config) is None:
            return dict.fromkeys(("quantization_tv", "quantization_kl_nats"))
        found = self.models.faithfulness(pair)
        return {"quantization_tv": found.mean_tv, "quantization_kl_nats": found.mean_kl_nats}
