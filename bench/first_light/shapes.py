"""Models of real dimensions with random weights: cost of a step, its profile, and the resulting speedup of methods.

The acceptance rates are prescribed, as measured with real weights on a CPU: only times are meaningful, not tokens.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.catalogue.pairs import Pair, catalogue, folder
from bench.first_light.report import Report
from bench.measure.cost import roofline
from specdec import AcceptanceCounts, Completion, Engine, PhaseTimes, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.methods import METHODS
from specdec.models.base import score
from specdec.models.causal import CausalLM
from specdec.models.loading import read_layer_bytes
from specdec.runtime.recording import Recorder
from specdec.runtime.timing import durations_in_queue_s, durations_s, synchronize
from specdec.stats import RunTotals, predicted_speedup

PAIRS = {"8b": "llama-8b-1b-shape", "135m": "smollm2-135m-shape", "tiny": "tiny-random"}
RATES = (0.75, 0.6, 0.5, 0.4)  # acceptance of each draft position
WIDTHS, CONTEXTS, MIDDLE = (1, 5, 2, 3, 9), (2048, 256, 8192), 2048
_METHODS = ("draft_model", "eagle", "hybrid", "ngram", "suffix", "early_exit", "tree")
_TOP_KERNELS, _TREE_NODES = 20, 12
_CAPACITY_STEP = 1024
_DTYPE = torch.bfloat16


def run(report: Report, device: torch.device, size: str = "tiny") -> None:
    """Measure a pair. size: "8b" or "135m". The most important facts come first, in case time runs out."""
    on_gpu = device.type == "cuda"
    size = size if on_gpu else "tiny"
    if (models := loaded(report, catalogue()[PAIRS[size]], device)) is None:
        return
    measured = roofline.measure(device, sizes=(2**29 if on_gpu else 2**22,), repeats=5)
    {"8b": _large, "135m": _small, "tiny": _tiny}[size](Work(report, models, measured["bandwidths"][-1]))


def _large(work: Work) -> None:
    work.steps("target", (1, 5), (MIDDLE,))
    work.profile("target", 1, MIDDLE)
    work.methods((0.0,), ("draft_model",))
    work.steps("draft", (1, 5), (MIDDLE,))
    work.profile("draft", 1, MIDDLE)
    work.methods((1.0,), ("draft_model",))
    work.steps("target", WIDTHS, CONTEXTS)
    work.steps("draft", WIDTHS, CONTEXTS)
    work.methods((0.0,), ("early_exit", "ngram"))


def _small(work: Work) -> None:
    work.steps("target", (1, 5), (256,))
    work.profile("target", 1, 256)
    work.methods((0.0, 1.0), _METHODS)
    work.profile("target", 5, 256)
    work.steps("target", WIDTHS, CONTEXTS)


def _tiny(work: Work) -> None:
    work.steps("target", (1, 5), (64,))
    work.profile("target", 1, 64)
    work.methods((0.0, 1.0), ("draft_model", "eagle", "ngram", "tree"), num_tokens=12)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A pair's target and its drafts by method."""

    name: str
    target: CausalLM
    drafts: dict[str, Any]

    def model(self, role: str) -> CausalLM:
        """role: "target" or "draft"."""
        model: CausalLM = self.target if role == "target" else self.drafts["draft_model"]
        return model


def loaded(report: Report, pair: Pair, device: torch.device) -> Loaded | None:
    """Load a pair and record the time and memory it takes; None, with a recorded reason, if it does not fit."""
    num_bytes = _weight_bytes(pair)
    if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < 1.2 * num_bytes + 2e9:
        report.skip(pair.name, f"{num_bytes / 1e9:.1f} GB of weights need more than the {free / 1e9:.1f} GB free here")
        return None
    models, start_s = None, time.perf_counter()
    with report.attempt(f"{pair.name} is loaded"):
        models = load(pair, device)
        synchronize(device)
        seconds = time.perf_counter() - start_s
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        memory = f", peak memory {peak / num_bytes:.2f} of its weights" if peak else ""
        text = f"{pair.name} loaded in {seconds:.1f} s{memory}"
        report.fact("loaded", text=text, pair=pair.name, seconds=seconds, peak_bytes=peak, weight_bytes=num_bytes)
    return models


def load(pair: Pair, device: torch.device) -> Loaded:
    """Load a pair as `specdec.Engine.load` does."""
    sources = {method: folder(source) for method in METHODS if (source := pair.draft_for(method))}
    options: dict[str, Any] = {
        "dtype": _DTYPE,
        "device": str(device),
        "attention": "sdpa",
        "load_format": pair.load_format,
    }
    target, drafts = load_with_drafts(folder(pair.target), set(sources.values()), **options)
    assert isinstance(target, CausalLM)
    return Loaded(pair.name, target, {method: drafts[source] for method, source in sources.items()})


def _weight_bytes(pair: Pair) -> int:
    sources = [folder(source) for source in (pair.target, pair.draft) if source]
    return sum(read_layer_bytes(source, _DTYPE, pair.load_format).total for source in sources)


@dataclass(slots=True)
class Decoded:
    """The result of a decoding run. completions: of one call. times: of its phases."""

    completions: list[Completion]
    times: PhaseTimes

    @property
    def totals(self) -> RunTotals:
        counts = AcceptanceCounts.total(completion.counts for completion in self.completions)
        return RunTotals(counts, self.times, sum(len(completion.token_ids) for completion in self.completions))

    @property
    def token_s(self) -> float:
        """Decoding time per token emitted by decode steps, in seconds."""
        return self.totals.decode_s / self.totals.counts.num_emitted


class Work:
    """The measurements of a pair. ceiling: memory bandwidth in bytes/s.

    prompts: token ids, decoded sequentially. rates: prescribed acceptance rates, or None for real verification.
    """

    def __init__(
        self,
        report: Report,
        models: Loaded,
        ceiling: float = math.inf,
        *,
        prompts: Sequence[Sequence[int]] = (),
        rates: Sequence[float] | None = RATES,
    ) -> None:
        self._report, self._models, self._ceiling, self._rates = report, models, ceiling, rates
        self._prompts = prompts or [_any_prompt(models.target, 128)]
        self._plain: dict[float, Decoded] = {}
        self._measured: set[tuple[str, int, int]] = set()

    def steps(self, role: str, widths: Sequence[int], contexts: Sequence[int]) -> None:
        """Time recorded steps by width and context, replayed back to back and with a wait after each."""
        for context in contexts:
            missing = [width for width in widths if (role, width, context) not in self._measured]
            results = []
            with self._report.attempt(f"{self._models.name} {role} steps over {context}"):
                for width in missing:
                    results.append(self._step(role, width, context))
                    self._measured.add((role, width, context))
            if results:
                title = f"{self._models.name} {role} step over {context}, width: ms in a row, share of bandwidth"
                self._report.fact("steps", text=f"{title}: {'; '.join(results)}")

    def _step(self, role: str, width: int, context: int) -> str:
        model = self._models.model(role)
        run = _runner(model, width, context)
        wall_s = statistics.median(durations_s(run, model.device, repeats=7, warm_up=3))
        in_queue_s = statistics.median(durations_in_queue_s(run, model.device, repeats=3, warm_up=0, calls=10))
        share = (model.step_bytes + context * model.token_bytes) / in_queue_s / self._ceiling
        values: dict[str, Any] = {"wall_s": wall_s, "in_queue_s": in_queue_s, "share_of_bandwidth": share}
        self._report.fact("step", pair=self._models.name, role=role, width=width, context=context, **values)
        return f"{width}: {1e3 * in_queue_s:.3f} ({1e3 * wall_s:.3f} with a wait), {share:.0%}"

    def profile(self, role: str, width: int, context: int) -> None:
        """Profile one step: its kernels by decreasing time, and their total against the wall time."""
        name = f"{self._models.name} {role} step of {width} over {context}"
        with self._report.attempt(f"profile of {name}"):
            model = self._models.model(role)
            run = _runner(model, width, context)
            wall_s = statistics.median(durations_s(run, model.device, repeats=7, warm_up=3))
            kernels = _kernels(run, model.device)
            busy_s, count = sum(kernel["us"] for kernel in kernels) / 1e6, sum(kernel["count"] for kernel in kernels)
            self._report.fact("profile", of=name, wall_s=wall_s, busy_s=busy_s, kernels=kernels[:_TOP_KERNELS])
            head = f"{name}: {count} kernels, busy {1e3 * busy_s:.3f} of {1e3 * wall_s:.3f} ms"
            longest = "; ".join(f"{k['count']} x {k['name'][:32]} {k['us']:.0f} us" for k in kernels[:6])
            self._report.fact("profile in short", text=f"{head}; {longest}")

    def methods(self, temperatures: Sequence[float], methods: Sequence[str], num_tokens: int = 64) -> None:
        """Time methods end to end, with the speedup predicted from their acceptance and phase times."""
        for temperature in temperatures:
            sampling = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)
            name = f"{self._models.name} T={temperature:g}"
            if temperature not in self._plain:
                with self._report.attempt(f"{name} plain"):
                    self._plain[temperature] = decoded(self._engine("autoregressive"), self._prompts, sampling)
                    self._record(name, "autoregressive", self._plain[temperature], None)
            for method in methods if temperature in self._plain else ():
                with self._report.attempt(f"{name} {method}"):
                    run = decoded(self._engine(method), self._prompts, sampling)
                    self._record(name, method, run, self._plain[temperature])

    def _engine(self, method: Any) -> Engine:
        options: dict[str, Any] = {"synthetic_acceptance_rates": self._rates}
        if method == "tree":  # acceptance rates cannot be prescribed for trees: only the cost of a step is meaningful
            options = {"num_speculative_tokens": _TREE_NODES}
        elif method == "autoregressive":
            options = {}
        return Engine(self._models.target, method=method, draft=self._models.drafts.get(method), **options)

    def _record(self, name: str, method: str, run: Decoded, plain: Decoded | None) -> None:
        totals, steps = run.totals, run.totals.counts.num_steps
        phases = ("draft", "scoring", "verification", "bookkeeping")
        per_step_s = {phase: getattr(run.times, f"{phase}_s") / steps for phase in phases}
        values: dict[str, Any] = {
            "tokens_per_s": 1 / run.token_s,
            "tokens_per_step": totals.counts.mean_acceptance_length,
            "acceptance_rate": totals.counts.acceptance_rate,
            "recording_s": run.times.recording_s,
            **{f"{phase}_s": seconds for phase, seconds in per_step_s.items()},
        }
        times = " + ".join(f"{1e3 * seconds:.2f} {phase}" for phase, seconds in per_step_s.items())
        if plain:
            values["speedup"] = plain.token_s / run.token_s
            costs_s = {f"{phase}_s": per_step_s[phase] for phase in phases[:3]}
            rates = totals.counts.acceptance_rate_at
            values["predicted_speedup"] = predicted_speedup(rates, step_s=plain.totals.step_s, **costs_s)
        self._report.fact("method", of=name, method=method, **values)
        gain = f", {values['speedup']:.2f} times plain, predicted {values['predicted_speedup']:.2f}" if plain else ""
        pace = f"{values['tokens_per_s']:.0f} tokens/s, {values['tokens_per_step']:.2f} per step{gain}"
        self._report.fact("methods", text=f"{name} {method}: {pace}; ms per step: {times}")


def decoded(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Decoded:
    """Decode the prompts twice to warm up, then three times; returns the run with the median time."""
    runs = []
    for _ in range(5):
        completions = engine.generate(prompts, sampling)
        runs.append(Decoded(completions, engine.phase_times))
    return sorted(runs[2:], key=lambda run: run.token_s)[1]


def _any_prompt(model: CausalLM, length: int) -> list[int]:
    return [token * 7919 % model.vocab_size for token in range(3, 3 + min(length, model.context_length // 2))]


def _runner(model: CausalLM, width: int, context: int) -> Callable[[], object]:
    """A function that queues a step of `width` tokens of one row, ending at position `context`."""
    context = min(context, model.context_length)
    capacity = min(-(-context // _CAPACITY_STEP) * _CAPACITY_STEP, model.context_length)
    tokens = torch.ones(1, width, dtype=torch.int64, device=model.device)
    cache, recorder = model.allocate(1, capacity), Recorder(model.device)

    @torch.inference_mode()
    def run() -> None:
        cache.num_cached[:] = [context - width]
        score(model, tokens, cache, recorder)

    return run


def _kernels(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Name, count and microseconds of the kernels on the device, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        run()
        synchronize(device)
    field, device_type = ("self_device_time_total", "CUDA") if on_gpu else ("self_cpu_time_total", "CPU")
    kernels = [
        {"name": event.key, "count": event.count, "us": round(us, 2)}
        for event in profiled.key_averages()
        if event.device_type.name == device_type and (us := getattr(event, field)) > 0
    ]
    return sorted(kernels, key=lambda kernel: -kernel["us"])
