"""Builds the record of a cell: flat, numbers in SI units, identities as strings; `bench.records.fields` declares it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from statistics import fmean
from typing import Any

from bench.campaign import arrivals
from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import Pair
from bench.engines.base import PromptResult, Run, Served
from bench.engines.registry import engine_kind, is_running
from bench.measure import acceptance, load
from bench.measure.paired import BASELINE, CANDIDATE, REFERENCE, Measurement
from bench.records.grouping import clusters_of_batches
from bench.records.intervals import geometric_mean_interval
from bench.records.schema import SCHEMA_VERSION, Cell, Gamma
from bench.workloads.base import bucket
from specdec import AcceptanceCounts, PhaseTimes
from specdec.methods import is_method, method_spec
from specdec.models import placement
from specdec.stats import RunTotals, SpeedupParts, attribute_speedup, expected_speedup, predicted_speedup

CLOSED = "closed loop"  # how requests arrive if each client waits for its answers


def build(
    cell: Cell,
    pair: Pair,
    config: BenchConfig,
    engine_version: str,
    device: str,
    measurement: Measurement,
    conversations: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The record of a measured cell. Values that are unknown or lack a comparison are None.

    conversations: the number of each prompt's; None if all are independent.
    """
    candidate, baseline = measurement.runs[CANDIDATE], measurement.runs.get(BASELINE)
    counts, times = acceptance.total(_results(candidate)), _total_times(candidate)
    clusters = None if conversations is None else clusters_of_batches(conversations, cell.batch_size)
    speedup = _comparison("speedup", candidate, baseline, clusters)
    return {
        "schema_version": SCHEMA_VERSION,
        **_identity(cell, pair, config, engine_version, device),
        **acceptance.of_results(_results(candidate), "per_prompt", conversations),
        **_phases(cell.method, counts, times),
        **(latencies := _latencies(candidate)),
        **_throughputs(latencies, num_devices(cell, config, device)),
        **speedup,
        "reference_engine": config.reference_engine,
        **_comparison("speedup_of_reference", measurement.runs.get(REFERENCE), candidate, clusters),
        # the closed form applies only to chains
        **_predictions(
            "auto" if cell.method == "tree" else cell.gamma, speedup["speedup"], _totals(candidate), _totals(baseline)
        ),
        "num_outputs_equal": _num_equal(candidate, baseline, config),
        "num_outputs_equal_reference": _num_equal(candidate, measurement.runs.get(REFERENCE), config),
        "output_sha256": output_sha256([result.token_ids for result in _results(candidate)]),
        **_per_prompt(BASELINE, baseline),
        **_per_prompt(REFERENCE, measurement.runs.get(REFERENCE)),
    }


def build_load(
    cell: Cell,
    pair: Pair,
    config: BenchConfig,
    engine_version: str,
    device: str,
    served: Served,
    arrivals_s: Sequence[float],
    conversations: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The record of a load cell, see `bench.measure.load`. Unknown values are None.

    arrivals_s: in order. conversations: as for `build`.
    """
    results = [result for result in served.results if result is not None]
    counts, times = acceptance.total(results), served.phase_times
    requests = [
        arrivals.Request(at, result.ttft_s, result.latency_s, len(result.token_ids), result.queue_s) if result else None
        for at, result in zip(arrivals_s, served.results, strict=True)
    ]
    window = load.Window(*config.window_s)
    summary = load.summary(arrivals_s, requests, window, config.limits)
    accepted = [index for index in range(len(requests)) if index not in served.refused]
    ends = [request.end_s if request else served.wall_s for request in requests]
    spans = [(arrivals_s[index], ends[index]) for index in accepted]
    mean_in_flight, peak_in_flight = load.in_flight(spans, window)
    return {
        "schema_version": SCHEMA_VERSION,
        **_identity(cell, pair, config, engine_version, device),
        "rate": cell.rate,
        "concurrency": cell.concurrency,
        "think_time_s": config.think_time,
        "arrivals": config.arrivals if cell.rate is not None else CLOSED,
        "duration_s": config.duration,
        "window_start_s": window.start_s,
        "window_end_s": window.end_s,
        "drain_s": config.drain,
        "ttft_limit_s": config.ttft_limit,
        "inter_token_limit_s": config.inter_token_limit,
        **summary,
        **_of_devices(summary, num_devices(cell, config, device)),
        **load.saturation(arrivals_s, requests, served.refused, window, served.wall_s, is_open=cell.rate is not None),
        "queue_s": served.queue_s if summary["queue_s"] is None else summary["queue_s"],
        "num_unfinished": len(accepted) - len(results),
        "num_refused": len(served.refused),
        "mean_num_in_flight": mean_in_flight,
        "peak_num_in_flight": peak_in_flight,
        "busy_rate": (times.total_s - times.bookkeeping_s) / times.total_s if times else None,
        "peak_send_delay_s": served.peak_send_delay_s,
        **acceptance.of_results(served.results, "per_request", conversations),
        **acceptance.over_service(arrivals_s, served.results, config.duration),
        **_phases(cell.method, counts, times),
        "bookkeeping_time_s": None,  # it would include waiting for arrivals
        "overhead_rate": None,
        "output_sha256": output_sha256([result.token_ids if result else () for result in served.results]),
        "per_request_arrival_s": list(arrivals_s),
        "per_request_ttft_s": [request and request.ttft_s for request in requests],
        "per_request_latency_s": [request and request.latency_s for request in requests],
        "per_request_tokens": [request and request.num_tokens for request in requests],
    }


def output_sha256(outputs: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the emitted token ids, as a JSON list of lists without spaces."""
    return hashlib.sha256(json.dumps([list(tokens) for tokens in outputs], separators=(",", ":")).encode()).hexdigest()


def _identity(cell: Cell, pair: Pair, config: BenchConfig, engine_version: str, device: str) -> dict[str, Any]:
    _, lengths = bucket(cell.workload, config.prompt_lengths)
    length = config.synthetic_acceptance_length
    return {
        "engine": cell.engine,
        "engine_version": engine_version,
        "pair": cell.pair,
        "target": pair.target,
        "draft": pair.draft_for(cell.method),
        "method": cell.method,
        "gamma": cell.gamma,
        "placement": cell.placement,
        "workload": cell.workload,
        "prompt_format": config.prompt_format,
        "turns": config.turns,
        "template_arguments": json.dumps(config.template_arguments, sort_keys=True),
        "prompt_lengths": "{}:{}".format(*lengths) if lengths else None,
        "dtype": config.dtype_of(pair),
        "device": device,
        "num_devices": num_devices(cell, config, device),
        "batch_size": cell.batch_size,
        "verification": config.verification,
        "synthetic_acceptance_rates": list(config.prescribed_rates(cell.gamma)) or None,
        "synthetic_acceptance_length": length.at(cell.gamma) if length and cell.gamma else None,
        "load_format": pair.load_format,
        "quantisation": config.quantization_of(cell.engine),
        **_published(pair, cell.method),
        "engine_options": config.vllm_options if cell.engine.startswith("vllm") else None,
        "max_tokens": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
    }


def num_devices(cell: Cell, config: BenchConfig, device: str) -> int | None:
    """Devices that a cell's models are on; None if an engine or a server decides it."""
    if is_running(cell.engine, config.peers):
        return None
    if engine_kind(cell.engine).package == "vllm":
        options = json.loads(config.vllm_options)
        return math.prod(int(options.get(f"{axis}_parallel_size", 1)) for axis in ("tensor", "pipeline", "data"))
    if cell.placement == "auto":
        return None
    return placement.num_devices(cell.placement) if device.startswith("cuda") else 1


def _of_devices(summary: Mapping[str, Any], num_devices: int | None) -> dict[str, float | None]:
    """The throughput of a load, with its interval, for each device."""
    ends = ("", "_low", "_high")
    throughputs = {end: summary[f"throughput_tok_s{end}"] for end in ends}
    return {
        f"device_throughput_tok_s{end}": each / num_devices if num_devices and each is not None else None
        for end, each in throughputs.items()
    }


def _throughputs(times: Mapping[str, Any], num_devices: int | None) -> dict[str, float | None]:
    """What one user sees against what one device does. times: the record's `inter_token_s` and `throughput_tok_s`."""
    return {
        "user_throughput_tok_s": 1 / times["inter_token_s"] if times["inter_token_s"] else None,
        "device_throughput_tok_s": times["throughput_tok_s"] / num_devices if num_devices else None,
    }


def _published(pair: Pair, method: str) -> dict[str, Any]:
    """Published results for the pair and the method."""
    found = pair.published_for(method)
    names = ("speedup", "acceptance_rate", "mean_acceptance_length", "setting", "source")
    return {f"published_{name}": getattr(found, name, None) for name in names}


def _phases(method: str, counts: AcceptanceCounts | None, times: PhaseTimes | None) -> dict[str, Any]:
    """Seconds per phase over the whole run; None for phases that an engine does not report.

    overhead_rate: fraction of the time outside model forwards; None if drafting itself consists of forwards.
    """
    overhead_s = times.total_s - times.prefill_s - times.scoring_s if times else 0.0
    num_drafted = counts.num_drafted if counts else 0
    return {
        "draft_time_per_token_s": times.draft_s / num_drafted if times and num_drafted else None,
        "prefill_time_s": times.prefill_s if times else None,
        "scoring_time_s": times.scoring_s if times else None,
        "verification_time_s": times.verification_s if times else None,
        "bookkeeping_time_s": times.bookkeeping_s if times else None,
        "recording_time_s": times.recording_s if times else None,
        "overhead_rate": overhead_s / times.total_s
        if times and not (is_method(method) and method_spec(method).draw)
        else None,
    }


def _latencies(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over prompts, and the throughput over all rounds.

    A round lasts from its start to the last token of its prompts, by the engine's clock. This excludes work of the
    harness, such as reading a server's counters.
    """
    results = _results(runs)
    run_s = sum(max(result.latency_s for result in run.results) for run in runs)
    longer = [result for result in results if len(result.token_ids) > 1]
    inter_token_s = [(result.latency_s - result.ttft_s) / (len(result.token_ids) - 1) for result in longer]
    return {
        "num_prompts": len(results),
        "num_tokens": sum(len(result.token_ids) for result in results),
        "ttft_s": fmean(result.ttft_s for result in results),
        "latency_s": fmean(result.latency_s for result in results),
        "inter_token_s": fmean(inter_token_s) if inter_token_s else None,
        "throughput_tok_s": sum(len(result.token_ids) for result in results) / run_s,
        "per_prompt_latency_s": [result.latency_s for result in results],
        "per_prompt_ttft_s": [result.ttft_s for result in results],
        "per_prompt_tokens": [len(result.token_ids) for result in results],
    }


def _comparison(
    name: str, faster: list[Run] | None, slower: list[Run] | None, clusters: Sequence[int] | None = None
) -> dict[str, Any]:
    """Speedup of one arm over another: ratio of latencies per emitted token, paired by round, with its interval.

    For outputs of equal length this is the ratio of latencies. For outputs of different length (after rounding
    differences, or with sampling) the ratio of latencies would favor the arm that happened to stop sooner.
    """
    if not faster or not slower:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    ratios = [_time_per_token(slow) / _time_per_token(fast) for fast, slow in zip(faster, slower, strict=True)]
    interval = geometric_mean_interval(ratios, clusters)
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _time_per_token(run: Run) -> float:
    """Seconds per emitted token of a batch as a whole, because its rows are not independent."""
    return sum(result.latency_s for result in run.results) / sum(len(result.token_ids) for result in run.results)


def _predictions(
    gamma: Gamma, speedup: float | None, run: RunTotals | None, plain: RunTotals | None
) -> dict[str, float | None]:
    """Predictions from acceptance and phase times; all None for an engine that does not report its phases.

    cost_ratio: time per draft token / plain step. step_cost_ratio: time to score and verify a step / plain step.
    predicted_speedup and speedup_from_*: the parts of `speedup`, see `specdec.stats.SpeedupParts`.
    """
    parts = [f"speedup_from_{field.name}" for field in fields(SpeedupParts)[1:]]
    names = ("cost_ratio", "step_cost_ratio", "expected_speedup", "predicted_speedup", *parts)
    if not (speedup and run and plain and run.counts.num_drafted and plain.counts.num_steps):
        return dict.fromkeys(names)
    counts, times = run.counts, run.times
    cost_ratio = times.draft_s / counts.num_drafted / plain.step_s
    predicted = predicted_speedup(
        counts.acceptance_rate_at,
        step_s=plain.step_s,
        draft_s=times.draft_s / counts.num_steps,
        scoring_s=times.scoring_s / counts.num_steps,
        verification_s=times.verification_s / counts.num_steps,
    )
    # the closed form needs a single rate, here that of the first draft token, and a fixed draft length
    expected = None if gamma == "auto" else expected_speedup(counts.acceptance_rate_at[0], gamma, cost_ratio)
    attributed = astuple(attribute_speedup(speedup, predicted, run, plain))
    return dict(zip(names, (cost_ratio, run.step_s / plain.step_s, expected, *attributed), strict=True))


def _num_equal(runs: list[Run], others: list[Run] | None, config: BenchConfig) -> int | None:
    """The number of prompts with equal outputs; None with sampling or with prescribed acceptance rates."""
    if not others or config.temperature > 0 or config.prescribes_acceptance:
        return None
    pairs = zip(_results(runs), _results(others), strict=True)
    return sum(result.token_ids == other.token_ids for result, other in pairs)


def _results(runs: Sequence[Run]) -> list[PromptResult]:
    return [result for run in runs for result in run.results]


def _per_prompt(arm: str, runs: list[Run] | None) -> dict[str, Any]:
    """Times and tokens of another arm, from which the speedups can be recomputed."""
    return {
        f"{arm}_per_prompt_latency_s": [result.latency_s for result in _results(runs)] if runs else None,
        f"{arm}_per_prompt_tokens": [len(result.token_ids) for result in _results(runs)] if runs else None,
    }


def _totals(runs: Sequence[Run] | None) -> RunTotals | None:
    """None if the engine does not report counts and times."""
    counts, times = (acceptance.total(_results(runs)), _total_times(runs)) if runs else (None, None)
    num_tokens = sum(len(result.token_ids) for result in _results(runs or []))
    return RunTotals(counts, times, num_tokens) if counts and times else None


def _total_times(runs: Sequence[Run]) -> PhaseTimes | None:
    """The sum over rounds; None unless all of them report phase times."""
    times = [run.phase_times for run in runs if run.phase_times is not None]
    if len(times) < len(runs):
        return None
    return PhaseTimes(*(sum(getattr(phases, field.name) for phases in times) for field in fields(PhaseTimes)))
