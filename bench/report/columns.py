"""How fields of records are shown in tables: under which heading, and in which unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.records import fields
from bench.records.schema import Record
from bench.report.document import Heading, Table, table
from bench.report.format import interval, number, percent

SETTINGS = ("pair", "workload", "batch_size", "placement", "rate")  # told in a table if they vary
PARTS = ("truncation", "bookkeeping", "prefill", "averaging")

Show = Callable[[Record], str]


def _with(name: str, digits: int, factor: float = 1) -> Show:
    return lambda record: number(record.get(name), digits, factor)


def _signed(name: str) -> Show:
    return lambda record: "-" if record.get(name) is None else f"{record[name]:+z.3f}"


def _percent(name: str) -> Show:
    return lambda record: percent(record.get(name))


def _same(record: Record) -> str:
    equal = record["num_outputs_equal"]
    equal = record["num_outputs_equal_reference"] if equal is None else equal
    return "-" if equal is None else f"{equal} of {record['num_prompts']}"


# heading, and how a field is shown
SHOWN: dict[str, tuple[str, Show]] = {
    "throughput_tok_s": ("tokens/s", _with("throughput_tok_s", 1)),
    "speedup": ("speed-up [95 %]", lambda record: interval(record, "speedup")),
    "predicted_speedup": ("predicted", _with("predicted_speedup", 2)),
    "expected_speedup": ("closed form", _with("expected_speedup", 2)),
    "speedup_of_reference": ("reference is faster [95 %]", lambda record: interval(record, "speedup_of_reference")),
    "acceptance_rate": ("accepted", _percent("acceptance_rate")),
    "mean_acceptance_length": ("length", _with("mean_acceptance_length", 2)),
    "system_efficiency": ("efficiency", _percent("system_efficiency")),
    "latency_s": ("latency, s", _with("latency_s", 3)),
    "ttft_s": ("first token, s", _with("ttft_s", 3)),
    "inter_token_s": ("between tokens, ms", _with("inter_token_s", 2, 1e3)),
    "draft_time_per_token_s": ("ms per proposed token", _with("draft_time_per_token_s", 3, 1e3)),
    "prefill_time_s": ("prefill, s", _with("prefill_time_s", 3)),
    "scoring_time_s": ("scoring, s", _with("scoring_time_s", 3)),
    "verification_time_s": ("verification, s", _with("verification_time_s", 3)),
    "num_outputs_equal": ("same outputs", _same),
    "energy_j": ("J", _with("energy_j", 1)),
    "energy_per_token_j": ("J per emitted token", _with("energy_per_token_j", 3)),
    "energy_per_accepted_token_j": ("J per accepted token", _with("energy_per_accepted_token_j", 3)),
    "average_power_w": ("W", _with("average_power_w", 1)),
    "peak_power_w": ("peak W", _with("peak_power_w", 1)),
    "average_utilisation_rate": ("utilisation", _percent("average_utilisation_rate")),
    "peak_memory_bytes": ("peak memory, GB", _with("peak_memory_bytes", 1, 1e-9)),
    "peak_temperature_c": ("peak °C", _with("peak_temperature_c", 0)),
    "quality": ("score", _with("quality", 3)),
    "quality_baseline": ("of plain decoding", _with("quality_baseline", 3)),
    "quality_difference": (
        "difference [95 %]",
        lambda record: interval(record, "quality_difference", "+z.3f"),
    ),
    "published_speedup": ("theirs", _with("published_speedup", 2)),
    "published_acceptance_rate": ("their acceptance", _percent("published_acceptance_rate")),
    "published_mean_acceptance_length": ("their length", _with("published_mean_acceptance_length", 2)),
    "p_value": ("p", lambda record: p_value(record.get("p_value"))),
    "control_p_value": ("p of plain decoding", lambda record: p_value(record.get("control_p_value"))),
    "tv_upper_bound": ("distance at most", lambda record: p_value(record.get("tv_upper_bound"))),
    "min_detectable_tv": ("would have been found", lambda record: p_value(record.get("min_detectable_tv"))),
    "roofline_share": ("of the roofline", lambda record: percent(record.get("roofline_share"), 0)),
    "median_s": ("ms", _with("median_s", 3, 1e3)),
    "step_s": ("ms per step", _with("step_s", 2, 1e3)),
    **{f"speedup_from_{part}": (part, _signed(f"speedup_from_{part}")) for part in PARTS},
}


# headings of fields that are shown as they are
HEADINGS = {
    "num_requests": "requests",
    "num_finished": "finished",
    "within_limits_rate": "within limits",
    "mean_num_in_flight": "in flight",
    "num_draws": "tokens judged",
    "published_setting": "setting",
    "published_source": "source",
    **{
        f"{name}_p{percent}_s": f"{words} {percent} %, s"
        for name, words in (("ttft", "first token"), ("inter_token", "between tokens"), ("latency", "latency"))
        for percent in (50, 95, 99)
    },
}


def p_value(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else str(value if value is not None else "-")


def shown(records: Sequence[Record], names: Sequence[str], caption: str = "") -> Table:
    """A table with a row for each record: what names it, and these fields as far as any record has them."""
    if not records:
        return table([], [])
    labels = labels_of(records)
    kept = [name for name in names if any(record.get(name) is not None for record in records)]
    reference = records[0].get("reference_engine") or "reference"
    headings = [Heading(heading(name).replace("reference", reference), name) for name in (*labels, *kept)]
    rows = [tuple(text(record, name) for name in (*labels, *kept)) for record in records]
    return table(headings, rows, caption)


def labels_of(records: Sequence[Record]) -> list[str]:
    """What names a cell among these: engine, method and gamma, and before them whatever varies."""
    varying = [name for name in SETTINGS if len({str(record.get(name)) for record in records}) > 1]
    return [*varying, "engine", "method", "gamma"]


def heading(name: str) -> str:
    return SHOWN[name][0] if name in SHOWN else HEADINGS.get(name, fields.column(name).heading)


def text(record: Record, name: str) -> str:
    if name in SHOWN:
        return SHOWN[name][1](record)
    value = record.get(name)
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
