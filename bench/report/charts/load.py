"""Charts of load cells: latencies and completions against the rate or the number of clients, and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.analysis.break_even import level, speedups
from bench.records.grouping import grouped
from bench.records.schema import PERCENTILES
from bench.report.charts import names
from bench.report.charts.model import Chart, Series

Record = dict[str, Any]
Kinds = dict[tuple[str, Any], int]  # (method, gamma) -> color and marker, the same in all charts of a run
LevelChart = tuple[str, str, str, list[Series]]  # name, title, label of the y axis, series
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


@dataclass(frozen=True, slots=True)
class Axis:
    """What is varied. field: of records. prefix: of the charts' names. by, speedup: in titles. label: of the x axis."""

    field: str
    prefix: str
    by: str
    speedup: str
    label: str
    unit: str


AXES = (
    Axis("rate", "load", "arrival rate", "Speed-up under load", "arrival rate, requests/s", "requests/s"),
    Axis("concurrency", "clients", "clients", "Speed-up by clients", "clients of a closed loop", "clients"),
)


def charts(records: Sequence[Record]) -> Iterator[Chart]:
    """Charts per engine, models and workload, of open and of closed loops."""
    arms = [arm for arm in grouped(records, "method", "gamma") if arm[0] != "autoregressive"]
    kinds = {arm: kind for kind, arm in enumerate(arms)}
    for axis in AXES:
        known = [record for record in records if record.get(axis.field) is not None]
        for block in grouped(known, "pair", "workload", "placement", "engine").values():
            yield from _of_block(block, axis, kinds)


def _of_block(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Iterator[Chart]:
    about = f"{block[0]['engine']}\n{names.about(block[0], with_batch=False)}"
    ticks = tuple((at, f"{at:g}") for at in sorted({level(record) for record in block}))
    for name, title, label, series in (
        *_speedups(block, axis, kinds),
        *_latencies(block, axis, kinds),
        *_completions(block, axis, kinds),
    ):
        file = names.name(f"{axis.prefix}-{name}", block[0], with_batch=False)
        yield Chart(file, f"{title}: {about}", axis.label, label, tuple(series), ticks=ticks)
    for name, title, labels, series in (_crossed(block, axis, kinds), _pareto(block, axis, kinds)):
        if series:
            file = names.name(f"{axis.prefix}-{name}", block[0], with_batch=False)
            yield Chart(file, f"{title}, by {axis.by}: {about}", *labels, tuple(series))


def _speedups(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Iterator[LevelChart]:
    """Where speculation stops paying off, by the ratio of median latencies, with intervals where they are steady."""
    arms = grouped(block, "method", "gamma")
    series = []
    for arm, found in arms.items():
        curve = speedups(arms.get(("autoregressive", 0), []), found)
        known = {at: each for at, each in curve.items() if each is not None}
        if known and arm in kinds:
            points = known.values()
            y = tuple(each.estimate for each in points)
            low = tuple(each.estimate if each.low is None else each.low for each in points)
            high = tuple(each.estimate if each.high is None else each.high for each in points)
            ends = (low, high) if (low, high) != (y, y) else (None, None)
            series.append(Series(names.arm(*arm), tuple(known), y, kinds[arm], *ends))
    if series:
        places = [at for each in series for at in each.x]
        plain = Series("plain decoding", (min(places), max(places)), (1.0, 1.0), -1, dashed=True)
        yield "speedup", axis.speedup, "median latency, plain decoding / method", [plain, *series]


def _latencies(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Iterator[LevelChart]:
    """A chart per latency: medians as solid lines, the highest percentile reached as dashed lines."""
    for of, title in LATENCIES.items():
        known = [each for each in PERCENTILES if any(record.get(f"{of}_p{each}_s") is not None for record in block)]
        series = [
            line
            for percent in dict.fromkeys((*known[:1], *known[-1:]))
            for line in _by_level(block, f"{of}_p{percent}_s", kinds, f": p{percent}", dashed=percent != known[0])
        ]
        if series:
            yield of, f"{title} by {axis.by}", "seconds", series


def _completions(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Iterator[LevelChart]:
    for name, (title, label) in COMPLETIONS.items():
        if series := _by_level(block, name, kinds):
            yield name, f"{title} by {axis.by}", label, series


def _by_level(
    block: Sequence[Record], name: str, kinds: Kinds, suffix: str = "", *, dashed: bool = False
) -> list[Series]:
    """A field against the rate or the number of clients, for each method and gamma."""
    found = []
    for arm, group in _known(block, name).items():
        x, y = tuple(map(level, group)), _values(group, name)
        low, high = (None, None) if dashed else _ends(group, name)
        found.append(Series(names.arm(*arm) + suffix, x, y, kinds.get(arm, -1), low, high, dashed=dashed))
    return found


Crossed = tuple[str, str, tuple[str, str], list[Series]]  # name, title, labels of the axes, series


def _crossed(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Crossed:
    """Throughput against median latency, with the levels joined."""
    labels = ("median latency, s", "tokens per second")
    series = _joined(block, "latency_p50_s", "throughput_tok_s", axis, kinds)
    return "throughput", "Throughput vs. latency", labels, series


def _pareto(block: Sequence[Record], axis: Axis, kinds: Kinds) -> Crossed:
    """What a device yields against what each user gets: up and to the right is better."""
    labels = ("tokens per second of each user", "tokens per second of a device")
    series = _joined(block, "user_throughput_tok_s", "device_throughput_tok_s", axis, kinds)
    return "pareto", "Throughput per device vs. per user", labels, series


def _joined(block: Sequence[Record], x: str, y: str, axis: Axis, kinds: Kinds) -> list[Series]:
    """A field against another, with the levels of each method and gamma joined, and the intervals of both."""
    found = []
    for arm, group in _known(block, x, y).items():
        places = tuple(f"{level(record):g} {axis.unit}" for record in group)
        (low, high), (left, right) = _ends(group, y), _ends(group, x)
        values = _values(group, x), _values(group, y), kinds.get(arm, -1)
        found.append(Series(names.arm(*arm), *values, low, high, names=places, left=left, right=right))
    return found


def _known(block: Sequence[Record], *fields: str) -> dict[Any, list[Record]]:
    """Records that have these fields, by method and gamma, in the order of their levels."""
    known = [record for record in block if all(record.get(name) is not None for name in fields)]
    return grouped(sorted(known, key=level), "method", "gamma")


def _values(records: Sequence[Record], name: str) -> tuple[float, ...]:
    return tuple(float(record[name]) for record in records)


def _ends(records: Sequence[Record], name: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The ends of a field's intervals, if all records have them."""
    ends = [f"{name}_low", f"{name}_high"]
    if any(record.get(end) is None for record in records for end in ends):
        return None, None
    return _values(records, ends[0]), _values(records, ends[1])
