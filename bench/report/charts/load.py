"""Charts of load cells: latencies and completions against the arrival rate, and one against the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bench.analysis.break_even import ratios
from bench.records.grouping import grouped
from bench.records.schema import PERCENTILES
from bench.report.charts import names
from bench.report.charts.model import Chart, Series

Record = dict[str, Any]
Kinds = dict[tuple[str, Any], int]  # (method, gamma) -> color and marker, the same in all charts of a run
RateChart = tuple[str, str, str, list[Series]]  # name, title, label of the y axis, series
LATENCIES = {
    "latency": "Latency",
    "ttft": "Time to first token",
    "inter_token": "Inter-token latency",
    "queue": "Queueing time",
}
COMPLETIONS = {
    "throughput_tok_s": ("Throughput", "tokens per second"),
    "goodput": ("Goodput", "requests/s within the latency limits"),
}


def charts(records: Sequence[Record]) -> Iterator[Chart]:
    """Charts per engine, models and workload."""
    arms = [arm for arm in grouped(records, "method", "gamma") if arm[0] != "autoregressive"]
    kinds = {arm: kind for kind, arm in enumerate(arms)}
    for block in grouped(records, "pair", "workload", "placement", "engine").values():
        about = f"{block[0]['engine']}\n{names.about(block[0], with_batch=False)}"
        ticks = tuple((rate, f"{rate:g}") for rate in sorted({float(record["rate"]) for record in block}))
        for name, title, label, series in (
            *_speedups(block, kinds),
            *_latencies(block, kinds),
            *_completions(block, kinds),
        ):
            file = names.name(f"load-{name}", block[0], with_batch=False)
            yield Chart(file, f"{title}: {about}", "arrival rate, requests/s", label, tuple(series), ticks=ticks)
        if crossed := _crossed(block, kinds):
            file = names.name("load-throughput", block[0], with_batch=False)
            title = f"Throughput vs. latency, by rate: {about}"
            yield Chart(file, title, "median latency, s", "tokens per second", tuple(crossed))


def _speedups(block: Sequence[Record], kinds: Kinds) -> Iterator[RateChart]:
    """Where speculation stops paying off, by the ratio of median latencies at the same arrivals."""
    arms = grouped(block, "method", "gamma")
    series = []
    for arm, found in arms.items():
        curve = ratios(arms.get(("autoregressive", 0), []), found)
        known = {rate: ratio for rate, ratio in curve.items() if ratio is not None}
        if known and arm in kinds:
            series.append(Series(names.arm(*arm), tuple(known), tuple(known.values()), kinds[arm]))
    if series:
        rates = [rate for each in series for rate in each.x]
        plain = Series("plain decoding", (min(rates), max(rates)), (1.0, 1.0), -1, dashed=True)
        yield "speedup", "Speed-up under load", "median latency, plain decoding / method", [plain, *series]


def _latencies(block: Sequence[Record], kinds: Kinds) -> Iterator[RateChart]:
    """A chart per latency: medians as solid lines, the highest percentile reached as dashed lines."""
    for of, title in LATENCIES.items():
        known = [each for each in PERCENTILES if any(record.get(f"{of}_p{each}_s") is not None for record in block)]
        series = [
            line
            for percent in dict.fromkeys((*known[:1], *known[-1:]))
            for line in _by_rate(block, f"{of}_p{percent}_s", kinds, f": p{percent}", dashed=percent != known[0])
        ]
        if series:
            yield of, f"{title} by arrival rate", "seconds", series


def _completions(block: Sequence[Record], kinds: Kinds) -> Iterator[RateChart]:
    for name, (title, label) in COMPLETIONS.items():
        if series := _by_rate(block, name, kinds):
            yield name, f"{title} by arrival rate", label, series


def _by_rate(
    block: Sequence[Record], name: str, kinds: Kinds, suffix: str = "", *, dashed: bool = False
) -> list[Series]:
    """A field against the arrival rate, for each method and gamma."""
    return [
        Series(names.arm(*arm) + suffix, *_values(group, "rate", name), kinds.get(arm, -1), dashed=dashed)
        for arm, group in _known(block, name).items()
    ]


def _crossed(block: Sequence[Record], kinds: Kinds) -> list[Series]:
    """Throughput against median latency, with the rates joined."""
    axes = ("latency_p50_s", "throughput_tok_s")
    return [
        Series(
            names.arm(*arm),
            *_values(group, *axes),
            kinds.get(arm, -1),
            names=tuple(f"{record['rate']:g} requests/s" for record in group),
        )
        for arm, group in _known(block, *axes).items()
    ]


def _known(block: Sequence[Record], *fields: str) -> dict[Any, list[Record]]:
    """Records that have these fields, by method and gamma, in the order of their rates."""
    known = [record for record in block if all(record.get(name) is not None for name in fields)]
    return grouped(sorted(known, key=lambda record: record["rate"]), "method", "gamma")


def _values(records: Sequence[Record], x: str, y: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(record[x]) for record in records), tuple(float(record[y]) for record in records)
