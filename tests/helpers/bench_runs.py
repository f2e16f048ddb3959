"""Runs worked out by hand, as the benchmarks write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import results
from bench.report import chapters
from bench.report.terminal import chapter

Record = dict[str, Any]
MACHINE = {
    "cpu_model": "a processor",
    "cpu_count": 2,
    "torch_num_threads": 2,
    "gpus": [],
    "python_version": "3.11.7",
    "system": "Linux",
    "machine": "x86_64",
    "versions": {"specdec": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "vllm": None},
}


def decoded(method: str, gamma: int | str = 0, latency_s: Sequence[float] = (1.0, 2.0), **changes: Any) -> Record:
    """A cell of prompts with ten tokens each, whose plain decoding took twice as long."""
    record: Record = {"schema_version": 1, "engine": "specdec", "engine_version": "0.1.0", "pair": "tiny"}
    record |= {"target": "tiny", "draft": None, "method": method, "gamma": gamma, "placement": "same"}
    record |= {"workload": "smoke", "prompt_format": "instruct", "prompt_lengths": None, "dtype": "float32"}
    record |= {"device": "cpu", "batch_size": 1, "verification": "token", "load_format": "auto", "quantisation": "none"}
    record |= {"max_tokens": 10, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "num_prompts": len(latency_s)}
    record |= {"latency_s": sum(latency_s) / len(latency_s), "throughput_tok_s": 10 * len(latency_s) / sum(latency_s)}
    record |= {"per_prompt_latency_s": list(latency_s), "per_prompt_tokens": [10] * len(latency_s)}
    record |= {"num_tokens": 10 * len(latency_s), "reference_engine": "specdec", "output_sha256": "a" * 64}
    if method != "autoregressive":
        record |= {"speedup": 2.0, "speedup_low": 1.5, "speedup_high": 2.5, "predicted_speedup": 2.25}
        record |= {"acceptance_rate": 0.5, "acceptance_rate_low": 0.25, "acceptance_rate_high": 0.75}
        record |= {"num_steps": 5, "num_drafted": 20, "num_accepted": 10, "acceptance_rate_at": [0.75, 0.25]}
        record |= {"mean_acceptance_length": 3.0, "system_efficiency": 0.6, "draft_time_per_token_s": 0.0015}
        record |= {"scoring_time_s": 0.5, "verification_time_s": 0.0625, "num_outputs_equal": len(latency_s)}
        record |= {"baseline_per_prompt_latency_s": [2 * each for each in latency_s]}
        record |= {"baseline_per_prompt_tokens": [10] * len(latency_s)}
    return record | changes


def loaded(rate: float, method: str, gamma: int | str = 0, latency_s: float = 1.0, **changes: Any) -> Record:
    """Ten requests that arrived at a rate, of which half are done within a latency, 95 % in twice as much."""
    record = decoded(method, gamma)
    record = {name: value for name, value in record.items() if not name.startswith(("per_", "baseline_", "speedup"))}
    record |= {"rate": rate, "arrivals": "poisson", "duration_s": 10.0, "drain_s": 5.0, "num_requests": 10}
    record |= {"ttft_limit_s": 1.0, "inter_token_limit_s": 0.25, "num_finished": 9, "goodput": rate / 2}
    record |= {"within_limits_rate": 0.96, "throughput_tok_s": 8 * rate, "mean_num_in_flight": 2.0}
    for name, factor in (("latency", 1.0), ("ttft", 0.5), ("inter_token", 0.125)):
        record |= {f"{name}_p50_s": factor * latency_s, f"{name}_p95_s": 2 * factor * latency_s, f"{name}_p99_s": None}
    return record | changes


def audited(verdict: str, **changes: Any) -> Record:
    record = {"schema_version": 1, "engine": "specdec", "engine_version": "0.1.0", "pair": "tiny", "method": "ngram"}
    record |= {"gamma": 2, "verification": "token", "verdict": verdict, "reasons": ["p is small"], "p_value": 0.5}
    record |= {"control_p_value": 0.75, "num_draws": 20_000, "tv_upper_bound": 0.03, "min_detectable_tv": 0.04}
    record |= {"max_tv": 0.1, "tv_lower_bound": 0.02}
    return record | changes


def sized(axis: str, size: int, median_s: float, **changes: Any) -> Record:
    record = {"schema_version": 1, "axis": axis, "size": size, "median_s": median_s, "roofline_s": median_s / 2}
    record |= {"tokens": size, "pair": "tiny", "dtype": "float32", "device": "cpu", "roofline_share": 0.5}
    return record | {"read_bandwidth": 3e10} | changes


def printed(records: Sequence[Record]) -> list[str]:
    """The lines that a terminal gets at the end of a run."""
    return list(chapter.render(chapters.chapter(results.of_records(records), "run")))


def row_of(lines: Sequence[str], *cells: str) -> list[str]:
    """The first row that begins with these cells, by its words."""
    return next(words for line in lines if (words := line.split())[: len(cells)] == list(cells))


def document(records: Sequence[Record], **changes: Any) -> dict[str, Any]:
    """What pytest-benchmark writes; changes: of its top level."""
    benchmarks = [
        {"name": f"cell-{index}", "params": {}, "stats": {"data": [0.5, 0.25]}, "extra_info": record}
        for index, record in enumerate(records)
    ]
    run = {"machine_info": MACHINE, "datetime": "2026-01-02T03:04:05+00:00", "commit_info": {"id": "abc"}}
    return run | {"benchmarks": benchmarks, "schema_version": 1, "version": "5.3.1"} | changes


def write(path: Path, records: Sequence[Record], **changes: Any) -> Path:
    path.write_text(json.dumps(document(records, **changes)))
    return path
