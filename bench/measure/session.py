"""One run of the benchmarks: what is measured, on which prompts, with which models, and what came out."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, TextIO

import pytest

from bench.campaign import arrivals
from bench.campaign.options import BenchConfig
from bench.campaign.plan import Plan, plan
from bench.catalogue.pairs import Pair
from bench.engines.base import BenchEngine, EngineError, LoadOptions, Run, Setup
from bench.engines.registry import check_vocabulary, extension_files
from bench.engines.registry import load as load_engine
from bench.measure import fairness, machine, telemetry
from bench.measure.journal import Entry, Journal
from bench.measure.paired import BASELINE, CANDIDATE, REFERENCE, Arm, Clock, Measurement, check_counts, measure
from bench.measure.progress import NOWHERE, cell_bar
from bench.measure.quality import sandbox, scores
from bench.records.schema import Cell
from bench.workloads import registry
from bench.workloads.base import Lengths, Malformed, Prompt, UnavailableError, UnitTest, bucket
from specdec.prompts import encode, encode_bytes, encode_raw
from specdec.texts import continuation

if TYPE_CHECKING:
    from specdec import SamplingParams

WARM_UP_TOKENS = 8
Batch = list[tuple[int, ...]]  # prompts as token ids
Encoded = tuple[Prompt, tuple[int, ...]]  # and its token ids


class Session:
    """Prepares everything that can fail before anything expensive is done, then measures cell by cell.

    plans: all cells. records, load_records, cost_records, audit_records: those of the finished cells, in the order of
    the run. cells_of_shards: how many cells each part of the campaign has.
    clock: pytest-benchmark's timer. progress: where bars are drawn.
    Raises ValueError naming what was asked for and cannot be had.
    """

    def __init__(self, config: BenchConfig) -> None:
        self.config, self.clock = config, Clock()
        self.device = machine.resolve_device(config.device)
        self.arrivals = {
            rate: arrivals.arrivals(rate, config.duration, config.arrivals, config.seed) for rate in config.rate
        }
        self.plans = plan(config, lambda *cell: machine.why_no_room(*cell, config, self.device), self.device)
        self.malformed = {registry.label(name): Malformed(config.malformed) for name in config.workloads}
        self.prompts = {registry.label(name): self._read(name) for name in config.workloads}
        self._check_code_execution()
        self.records: list[dict[str, Any]] = []
        self.load_records: list[dict[str, Any]] = []
        self.cost_records: list[dict[str, Any]] = []
        self.audit_records: list[dict[str, Any]] = []
        self.cells_of_shards: list[int] = []
        self.failure: str | None = None  # to write the results
        self.journal: Journal | None = None
        self.num_resumed = 0
        self.progress: TextIO = NOWHERE
        self._models = _Models(config, self.device)
        self._plain_outputs: dict[Any, list[list[int]]] = {}  # of audits

    def open_journal(self) -> None:
        """Begin or resume the journal; until then nothing has been written."""
        self.journal = Journal.open(self.config.journal, self.configuration(), resume=self.config.resume)
        self.num_resumed = len(self.journal.cells.keys() & {_journal_name(each.cell) for each in self.plans})

    def close(self) -> None:
        """End what was started; the journal has every finished cell."""
        self._models.drop()
        if self.progress is not NOWHERE:
            self.progress.close()
        if self.journal:
            self.journal.close()

    def why_skipped(self, plan: Plan) -> str | None:
        """Why a cell cannot run here, and the remedy."""
        prompts = self.prompts[self._bucket(plan.cell)[0]]
        return plan.skip or (prompts if isinstance(prompts, str) else None)

    def run(self, cell: Cell, benchmark: Any) -> dict[str, Any]:
        """The record of a cell, from the journal or measured and then put there."""
        self.records.append(self._record(cell.id, benchmark, lambda: self._measure(cell, benchmark)))
        return self.records[-1]

    def run_load(self, cell: Cell, benchmark: Any) -> dict[str, Any]:
        """The record of a load cell, from the journal or measured and then put there."""
        self.load_records.append(
            self._record(_journal_name(cell), benchmark, lambda: self._measure_load(cell, benchmark))
        )
        return self.load_records[-1]

    def certify(self, cell: Cell, benchmark: Any) -> dict[str, Any]:
        """The record of a cell's audit, from the journal or made and then put there, and its certificate's files."""
        self.audit_records.append(
            self._record(f"equivalence-{cell.id}", benchmark, lambda: self._audit(cell, benchmark))
        )
        return self.audit_records[-1]

    def run_cost(self, axis: str, size: int, benchmark: Any) -> dict[str, Any]:
        """The record of a cell of the cost sweep, for the first pair, from the journal, or measured and put there."""
        name = f"cost-{axis}-{size}"
        self.cost_records.append(self._record(name, benchmark, lambda: self._measure_cost(axis, size, benchmark)))
        return self.cost_records[-1]

    def roofline(self) -> dict[str, Any]:
        """How fast memory is read here, from the journal or measured and then put there."""
        import torch

        from bench.measure.cost import roofline

        assert self.journal is not None
        if "roofline" not in self.journal.cells:
            self._keep("roofline", Entry(roofline.measure(torch.device(self.device)), []))
        return self.journal.cells["roofline"].record

    def _record(self, name: str, benchmark: Any, measured: Callable[[], Entry]) -> dict[str, Any]:
        assert self.journal is not None
        if name in self.journal.cells:
            self.clock.replay(benchmark, self.journal.cells[name].rounds_s)
        else:
            self._keep(name, measured())
        return self.journal.cells[name].record

    def _measure_cost(self, axis: str, size: int, benchmark: Any) -> Entry:
        from bench.measure.cost import sweep

        pair, method = self.config.pairs[0], sweep.needs(axis)
        if pair.lacks_draft(method):
            pytest.skip(f"pair={pair.name} has no draft for method={method}; name a pair that has with --pairs")
        engine: Any = self._models.engine("specdec", pair)
        identity = {"pair": pair.name, "dtype": self.config.dtype_of(pair), "device": self.device}
        texts = next((some for some in self.prompts.values() if not isinstance(some, str)), [])
        prompts = [_encode(prompt, engine.tokenizer, self.config, pair) for prompt in texts]
        return Entry(*sweep.measure(benchmark, engine, axis, size, self.roofline(), identity, prompts))

    def _audit(self, cell: Cell, benchmark: Any) -> Entry:
        from bench.measure import audit

        pair = self._pair(cell)
        self._models.prepare([cell, dataclasses.replace(cell, method="autoregressive", gamma=0)], pair)
        engine = self._models.engine(cell.engine, pair)
        prompts = [tokens for _, tokens in self._chosen(cell, pair)]
        certify = partial(audit.certify, engine, cell, pair, prompts, self.config, self.device, self._plain_outputs)
        try:
            with _failing(self.device), cell_bar(cell, self.config.num_draws, "token", self.progress) as done:
                certificate = benchmark.pedantic(partial(certify, on_tokens=done.update), rounds=1)
        except ValueError as error:
            pytest.fail(str(error), pytrace=False)
        folder = self.config.certificates
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / audit.file_name(certificate)
        certificate.save(path.with_name(f"{path.name}.json"))
        path.with_name(f"{path.name}.md").write_text(certificate.markdown())
        return Entry(certificate.record(), list(benchmark.stats.stats.data))

    def _pair(self, cell: Cell) -> Pair:
        pair = next(pair for pair in self.config.pairs if pair.name == cell.pair)
        return dataclasses.replace(pair, placement=cell.placement)

    def _keep(self, name: str, entry: Entry) -> None:
        assert self.journal is not None
        try:
            self.journal.append(name, entry)
        except OSError as error:
            pytest.exit(
                f"journal={self.journal.path} must be writable ({error.strerror}); the cells before this one "
                "are in it: free space and run again with --resume",
                returncode=3,
            )

    def _measure(self, cell: Cell, benchmark: Any) -> Entry:
        from bench.measure import records

        pair = self._pair(cell)
        chosen = self._chosen(cell, pair)
        batches = self._batches(cell, [tokens for _, tokens in chosen])
        cells = self._arm_cells(cell)
        self._models.prepare(cells.values(), pair)
        warm_up_s = {name: self._warm_up(each, pair, batches) for name, each in cells.items()}
        self._models.prepare(cells.values(), pair)  # again: the prompts of the warm-up are to be new
        arms = {name: self._arm(each, pair, batches) for name, each in cells.items()}
        sampler = telemetry.Sampler(self._meters(cell), self.config.telemetry_hz)
        with cell_bar(cell, len(batches) * len(arms), "run", self.progress) as done, sampler:

            def settle() -> None:  # after each run of an arm, outside of what is timed
                self._models.settle()
                done.update()

            measurement = measure(benchmark, arms, len(batches), settle)
        self._check(cells, pair, measurement)
        version = self._models.engine(cell.engine, pair).version
        record = records.build(cell, pair, self.config, version, self.device, measurement)
        record |= self._partings(pair, batches, measurement) | {"warm_up_time_s": warm_up_s[CANDIDATE]}
        record |= self._quality(pair, [prompt for prompt, _ in chosen], measurement)
        record |= self._rows_left_out(cell)
        num_tokens, num_accepted = record["num_tokens"], record["num_accepted"]
        record |= telemetry.record(sampler.trace, measurement.spans, self.config.telemetry_hz, num_tokens, num_accepted)
        return Entry(record, measurement.rounds_s)

    def _measure_load(self, cell: Cell, benchmark: Any) -> Entry:
        from bench.measure import records, serving

        config, pair = self.config, self._pair(cell)
        arrivals_s = self.arrivals[cell.rate or 0.0]
        chosen = [tokens for _, tokens in self._chosen(cell, pair)][: len(arrivals_s)]
        prompts = list(islice(cycle(chosen), len(arrivals_s)))
        requests = serving.Load(prompts, arrivals_s, self._sampling(0, len(prompts), config.max_tokens))
        self._models.prepare([cell], pair)
        engine: Any = self._models.engine(cell.engine, pair)
        with _failing(self.device):
            warm_up_s = self._warm_up_serving(cell, engine, chosen)
            self._models.settle()
            measured = serving.measure(benchmark, engine, cell, requests, config, self._meters(cell))
            self._models.settle()
        serving.check(engine, cell, measured.served, config.max_tokens, config.dtype_of(pair))
        record = records.build_load(cell, pair, config, engine.version, self.device, measured.served, arrivals_s)
        record |= {"num_prompts": len(chosen), "warm_up_time_s": warm_up_s}
        record |= self._rows_left_out(cell)
        counts = record["num_tokens"], record["num_accepted"]
        record |= telemetry.record(measured.trace, measured.spans, config.telemetry_hz, *counts)
        return Entry(record, measured.rounds_s)

    def _warm_up_serving(self, cell: Cell, engine: Any, prompts: Batch) -> float:
        """The longest prompt in every slot; on a GPU, where steps are recorded by shape, all of them twice, too."""
        from bench.measure import serving

        longest, limit_s = [max(prompts, key=len)] * cell.batch_size, self.config.duration + self.config.drain
        (sampling,) = self._sampling(0, 1, WARM_UP_TOKENS)
        warm_up_s = serving.warm_up(engine, cell, longest, sampling, limit_s)
        if self.device.startswith("cuda"):
            (sampling,) = self._sampling(0, 1, self.config.max_tokens)
            warm_up_s += serving.warm_up(engine, cell, 2 * prompts, sampling, limit_s)
        return warm_up_s

    def _meters(self, cell: Cell) -> dict[str, telemetry.Meter | str]:
        if cell.engine == "vllm-server" and self.config.server_url:
            return dict.fromkeys(("gpu", "cpu"), f"the server at {self.config.server_url} may be another machine")
        return telemetry.meters(machine.gpu_uuids(self.device))

    def _check(self, cells: Mapping[str, Cell], pair: Pair, measurement: Measurement) -> None:
        """Assert that the arms were measured on equal terms, and that what they say of themselves adds up."""
        engines = {each.engine: self._models.engine(each.engine, pair) for each in cells.values()}
        fairness.check_terms(engines, self.config.dtype_of(pair))
        for arm, each in cells.items():
            check_counts(measurement.runs[arm], each.method, self.config.max_tokens)
            stops = engines[each.engine].stop_token_ids
            fairness.check_ends(measurement.runs[arm], stops, self.config.max_tokens)

    def _partings(self, pair: Pair, batches: list[Batch], measurement: Measurement) -> dict[str, Any]:
        """Where greedy outputs part from the reference's, else from plain decoding's, and how near a tie it is there.

        The margin is specdec's target's; None without that engine.
        """
        theirs = measurement.runs.get(REFERENCE) or measurement.runs.get(BASELINE)
        if not theirs or self.config.temperature > 0 or self.config.synthetic_acceptance_rates:
            return {"first_difference_at": None, "margin_at_difference": None}
        positions = fairness.differences(measurement.runs[CANDIDATE], theirs)
        target = getattr(self._models.loaded("specdec"), "target", None)
        prompts = [prompt for batch in batches for prompt in batch]
        return {
            "first_difference_at": positions,
            "margin_at_difference": fairness.margins(target, prompts, theirs, positions) if target else None,
        }

    def _quality(self, pair: Pair, prompts: list[Prompt], measurement: Measurement) -> dict[str, Any]:
        """The workload's own score of the outputs, and of plain decoding's."""
        metric = scores.metric_of(prompts)
        if reason := self._why_no_quality(pair, metric):
            return scores.no_quality(metric, reason)
        if metric is None:
            return scores.no_quality(None, None)
        tokenizer = self._models.engine(self.config.reference_engine, pair).tokenizer
        texts = {arm: _texts(runs, tokenizer) for arm, runs in measurement.runs.items()}
        try:
            return scores.compare(metric, prompts, texts[CANDIDATE], texts.get(BASELINE))
        except sandbox.SandboxError as error:  # what was measured is worth keeping without a score
            return scores.no_quality(metric, f"code could not be run: {error}")

    def _why_no_quality(self, pair: Pair, metric: str | None) -> str | None:
        if metric is None:
            return None
        if pair.load_format == "dummy":
            return f"pair={pair.name} has random weights, whose output means nothing"
        if self.config.synthetic_acceptance_rates:
            return "acceptance was prescribed, so the output is not the model's"
        if metric == "pass_at_1" and not self.config.allow_code_execution:
            return "code that a model wrote is run only with --allow-code-execution"
        return None

    def _check_code_execution(self) -> None:
        """Raises ValueError if code is to be run and cannot be shut in here."""
        prompts = [prompt for some in self.prompts.values() if not isinstance(some, str) for prompt in some]
        has_code = any(isinstance(prompt.truth, UnitTest) for prompt in prompts)
        if self.config.allow_code_execution and has_code and (reason := sandbox.why_not()):
            raise ValueError(
                f"allow_code_execution=1 must be able to shut code in, but here {reason}; run as root or where users "
                "have namespaces, in a container with --cap-add SYS_ADMIN, or leave the option out"
            )

    def _chosen(self, cell: Cell, pair: Pair) -> list[Encoded]:
        """The cell's prompts with their token ids, those that have the length asked for.

        Fails the cell if one does not fit into the pair's context.
        """
        workload, lengths = self._bucket(cell)
        config, prompts = self.config, self.prompts[workload]
        assert not isinstance(prompts, str), "a skipped cell is not measured"
        tokenizer = self._models.engine(config.reference_engine, pair).tokenizer
        encoded = ((prompt, _encode(prompt, tokenizer, config, pair)) for prompt in prompts)
        chosen = list(encoded) if lengths is None else self._fitting(cell, encoded, lengths)
        for _, prompt in chosen:
            if pair.context is not None and len(prompt) + config.max_tokens > pair.context:
                pytest.fail(
                    f"workload={cell.workload} has a prompt of {len(prompt)} tokens, which with max_tokens="
                    f"{config.max_tokens} must fit into the context of pair={pair.name}, {pair.context}; "
                    "lower --max-tokens or choose another workload",
                    pytrace=False,
                )
        return chosen

    def _rows_left_out(self, cell: Cell) -> dict[str, int]:
        """How many rows of the cell's workload are malformed, and how many no prompts."""
        read = self.malformed[self._bucket(cell)[0]]
        return {"num_rows_skipped": len(read.skipped), "num_rows_passed_over": len(read.passed_over)}

    def _bucket(self, cell: Cell) -> tuple[str, Lengths | None]:
        """Of a cell the workload, and the lengths of its prompts."""
        return bucket(cell.workload, self.config.prompt_lengths)

    def _fitting(self, cell: Cell, encoded: Iterator[Encoded], lengths: Lengths) -> list[Encoded]:
        """The first prompts whose length was asked for."""
        config = self.config
        least, most = lengths
        fitting = ((prompt, tokens) for prompt, tokens in encoded if least <= len(tokens) <= most)
        chosen = list(islice(fitting, config.num_prompts))
        if len(chosen) < config.num_prompts:
            pytest.fail(
                f"prompt_lengths={least}:{most} must hold for at least num_prompts={config.num_prompts} of the prompts "
                f"of workload={cell.workload}, but does for {len(chosen)}; widen it, or lower --num-prompts",
                pytrace=False,
            )
        return chosen

    def _batches(self, cell: Cell, prompts: Batch) -> list[Batch]:
        """The prompts, as token ids, in batches; the last one may be smaller."""
        return [prompts[i : i + cell.batch_size] for i in range(0, len(prompts), cell.batch_size)]

    def _arm_cells(self, cell: Cell) -> dict[str, Cell]:
        """What the cell's arms measure."""
        reference = dataclasses.replace(cell, engine=self.config.reference_engine)
        cells = {CANDIDATE: cell}
        # a server that is up drafts or does not
        if cell.method != "autoregressive" and not (cell.engine == "vllm-server" and self.config.server_url):
            cells[BASELINE] = dataclasses.replace(cell, method="autoregressive", gamma=0)
        if cell.engine != reference.engine and any(each.cell == reference and not each.skip for each in self.plans):
            cells[REFERENCE] = reference
        return cells

    def _warm_up(self, cell: Cell, pair: Pair, batches: list[Batch]) -> float:
        """A few tokens after the longest prompts; on a GPU, where steps are recorded by shape, everything twice.

        Returns the seconds that it took, compilation included.
        """
        start_s = time.perf_counter()
        longest = max(batches, key=lambda batch: (len(batch), max(map(len, batch))))
        self._generate(cell, pair, longest, 0, WARM_UP_TOKENS)
        for batch in 2 * batches if self.device.startswith("cuda") else ():
            self._generate(cell, pair, batch, 0, self.config.max_tokens)
        return time.perf_counter() - start_s

    def _arm(self, cell: Cell, pair: Pair, batches: list[Batch]) -> Arm:
        return lambda index: self._generate(cell, pair, batches[index], index * cell.batch_size, self.config.max_tokens)

    def _generate(self, cell: Cell, pair: Pair, batch: Batch, first: int, max_tokens: int) -> Run:
        """Decode a batch. first: the index of its first prompt."""
        sampling = self._sampling(first, len(batch), max_tokens)
        with _failing(self.device):
            return self._models.engine(cell.engine, pair).generate(batch, cell.method, cell.gamma, sampling)

    def _sampling(self, first: int, num_prompts: int, max_tokens: int) -> list[SamplingParams]:
        """Parameters of the prompts from number `first` on, each with a seed of its own."""
        from specdec import SamplingParams

        config = self.config
        distribution = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        return [
            SamplingParams(**distribution, max_tokens=max_tokens, seed=config.seed + first + row)
            for row in range(num_prompts)
        ]

    def _read(self, workload: str) -> list[Prompt] | str:
        """The sampled prompts; the reason if a workload that nobody named is not available."""
        config = self.config
        try:
            prompts = registry.read(workload, config.data_dir, self.malformed[registry.label(workload)])
        except UnavailableError as error:
            if "workloads" in config.named:
                raise
            return str(error)
        wanted = config.num_prompts if "num_prompts" in config.named or not config.rate else self._most_requests
        num_prompts = wanted if "num_prompts" in config.named else min(wanted, len(prompts))
        least = 1 if config.rate else max(config.batch_sizes)
        if not least <= num_prompts <= len(prompts):
            raise ValueError(
                f"num_prompts={num_prompts} must be at most {len(prompts)}, what workload {workload} has, "
                "and at least the batch size; lower --num-prompts or --batch-sizes"
            )
        # which prompts have the length asked for is known with a tokenizer: all of them are kept, in a drawn order
        return registry.sample(prompts, len(prompts) if config.prompt_lengths else num_prompts, config.seed)

    @property
    def _most_requests(self) -> int:
        """Requests of the highest rate."""
        return max(map(len, self.arrivals.values()))

    def versions(self) -> dict[str, str | None]:
        """Versions of what results depend on; vLLM's is that of the interpreter that runs it."""
        installed = machine.versions()
        if not {"vllm", "vllm-server"} & set(self.config.engines):
            return installed
        from bench.engines.vllm import installed_version

        return installed | {"vllm": installed_version(self.config.vllm_python)}

    def configuration(self) -> dict[str, Any]:
        """Everything that changes results: cells of different configurations must not be mixed."""
        options = dataclasses.asdict(self.config)
        for name in ("journal", "resume", "data_dir", "vllm_python", "certificates", "command", "named"):
            del options[name]
        texts = "\0".join(
            repr(prompt) for prompts in self.prompts.values() if not isinstance(prompts, str) for prompt in prompts
        )
        return {
            **options,
            "device": self.device,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
            "versions": self.versions(),
            "source_sha256": machine.source_sha256(extension_files(self.config.engines, self.config.methods)),
            "cpu_model": machine.cpu_model(),
            "cpu_count": os.cpu_count(),
        }


def _journal_name(cell: Cell) -> str:
    return cell.id if cell.rate is None else f"load-{cell.id}"


def _encode(prompt: Prompt, tokenizer: Any, config: BenchConfig, pair: Pair) -> tuple[int, ...]:
    """A prompt's token ids in the format asked for; of random weights without a tokenizer the bytes will do."""
    is_raw = config.prompt_format == "raw"
    if not is_raw and "prompt_format" in config.named and not getattr(tokenizer, "chat_template", None):
        pytest.fail("prompt_format=instruct must have a tokenizer with a chat template; use raw", pytrace=False)
    text = (prompt.raw or prompt.text) if is_raw else prompt.text
    if tokenizer is None and pair.load_format == "dummy":
        return encode_bytes(text)
    if tokenizer is None:
        pytest.fail(f"pair={pair.name} must have a tokenizer to read prompts; name a target with one", pytrace=False)
    return encode_raw(text, tokenizer) if is_raw else encode(text, tokenizer)


def _texts(runs: list[Run], tokenizer: Any) -> list[str]:
    """What each prompt was answered, without special tokens: texts that go on with something, first spaces included."""
    outputs = [result.token_ids for run in runs for result in run.results]
    if tokenizer is None:
        return [bytes(token % 256 for token in tokens).decode(errors="replace") for tokens in outputs]
    return [continuation(tokenizer, tokens) for tokens in outputs]


@contextmanager
def _failing(device: str) -> Iterator[None]:
    """An engine, or a GPU, that cannot go on fails its cell; the others are measured."""
    try:
        yield
    except EngineError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None  # the message says it all
    except RuntimeError as error:
        if (failure := machine.device_failure(error, device)) is None:
            raise
        raise pytest.fail.Exception(failure, pytrace=False) from None


class _Models:
    """Engines with the models of one pair in memory; they are dropped when another pair comes."""

    def __init__(self, config: BenchConfig, device: str) -> None:
        self._config, self._device = config, device
        self._pair: Pair | None = None
        self._engines: dict[str, BenchEngine] = {}

    def engine(self, name: str, pair: Pair) -> BenchEngine:
        if pair != self._pair:
            self.drop()
            self._pair = pair
        if name not in self._engines:
            with _failing(self._device):
                self._engines[name] = self._load(name, pair)
        return self._engines[name]

    def loaded(self, name: str) -> BenchEngine | None:
        """An engine, if it is in memory."""
        return self._engines.get(name)

    def prepare(self, cells: Collection[Cell], pair: Pair) -> None:
        """Make each engine ready for the cells that are its own, the others for none."""
        for name in {*self._engines, *(cell.engine for cell in cells)}:
            setups = {Setup(cell.method, cell.gamma, cell.batch_size) for cell in cells if cell.engine == name}
            with _failing(self._device):
                self.engine(name, pair).prepare(setups)
        gc.collect()  # a full collection takes 0.2 s: not within what is timed

    def settle(self) -> None:
        """Wait until no engine keeps the machine busy."""
        for engine in self._engines.values():
            engine.settle()

    def drop(self) -> None:
        """Let go of all engines."""
        while self._engines:
            self._engines.popitem()[1].close()

    def _load(self, name: str, pair: Pair) -> BenchEngine:
        """Load; a model that nobody named and that cannot be had (no network) skips the cell."""
        from specdec.models.causal import UnsupportedModelError
        from specdec.models.placement import PlacementError
        from specdec.runtime.artifacts import LoadError

        config = self._config
        options = LoadOptions(
            config.dtype_of(pair),
            self._device,
            config.verification,
            config.synthetic_acceptance_rates,
            config.vllm,
            None if config.quantisation == "none" else config.quantisation,
        )
        try:
            check_vocabulary(pair, name)
            return load_engine(name, pair, options)
        except (LoadError, UnsupportedModelError, PlacementError) as error:
            gate = (
                f"; if the hub refused it: accept the licence at https://huggingface.co/{pair.target} (and the "
                "draft's), then run hf auth login"
            )
            message = f"{error}{gate if pair.gated and isinstance(error, LoadError) else ''}"
        if {"pairs", "placements"} & config.named:  # outside of `except`: the message says it all
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
