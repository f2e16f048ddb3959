"""Charts of decoding cells: speed-up, acceptance, time per phase, throughput vs. latency, energy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bench.analysis.best_gamma import best_gammas
from bench.records.grouping import WITHOUT_ENGINE, drafting, fastest, grouped
from bench.report.charts import names
from bench.report.charts.model import Chart, Line, Picture, Rows, Series

Record = dict[str, Any]
Kinds = dict[str, int]  # method -> color and marker, the same in all charts of a run
Block = Sequence[Sequence[Record]]  # cells that differ in engine, method and gamma only, by engine
GAMMA = "gamma: tokens drafted per step"
PREDICTED = "predicted, prefill excluded"


@dataclass(frozen=True, slots=True)
class Metric:
    """A value of a cell, plotted against gamma.

    value: of a record, in the unit of the label, or None. has_plain: whether plain decoding has it too, as a line to
    compare with. y_max: the largest value possible. low, high: fields with the ends of its interval.
    """

    name: str
    title: str
    label: str
    value: Callable[[Record], float | None]
    has_plain: bool = False
    y_max: float = 0.0
    low: str | None = None
    high: str | None = None


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name]


def _milliseconds(name: str, per: str | None = None) -> Callable[[Record], float | None]:
    """A time in milliseconds, divided by a count; None where either is missing."""

    def value(record: Record) -> float | None:
        count = record[per] if per else 1
        return float(1e3 * record[name] / count) if record[name] is not None and count else None

    return value


METRICS = {
    "acceptance": (
        Metric(
            "acceptance-rate",
            "Acceptance rate",
            "accepted / drafted tokens",
            _field("acceptance_rate"),
            y_max=1.0,
            low="acceptance_rate_low",
            high="acceptance_rate_high",
        ),
        Metric(
            "system-efficiency",
            "System efficiency",
            "emitted tokens / those of a perfect draft",
            # an empty draft is trivially perfect
            lambda record: record["system_efficiency"] if record["num_drafted"] else None,
            y_max=1.0,
        ),
    ),
    "time": (
        Metric("draft-time", "Draft time", "ms per drafted token", _milliseconds("draft_time_per_token_s")),
        Metric(
            "scoring-time",
            "Scoring time (target forward passes)",
            "ms per emitted token",
            _milliseconds("scoring_time_s", "num_tokens"),
            True,
        ),
        Metric(
            "verification-time",
            "Verification time",
            "ms per emitted token",
            _milliseconds("verification_time_s", "num_tokens"),
            True,
        ),
        Metric("latency", "Latency", "s per prompt", _field("latency_s"), True),
    ),
    "energy": (
        Metric("energy-per-token", "Energy per emitted token", "J", _field("energy_per_token_j"), True),
        Metric("energy-per-accepted", "Energy per accepted token", "J", _field("energy_per_accepted_token_j")),
    ),
}


def sections(cells: Sequence[Record]) -> dict[str, list[Picture]]:
    """Charts of decoding cells by section of the report; those of one block follow each other."""
    kinds = kinds_of(cells)
    blocks = [list(grouped(block, "engine").values()) for block in grouped(cells, *WITHOUT_ENGINE).values()]
    return {
        "speedup": [chart for block in blocks for chart in _speedups(block, kinds)],
        "acceptance": [chart for block in blocks for chart in _acceptances(block, kinds)],
        "time": [chart for block in blocks for chart in _metrics("time", block, kinds)],
        "throughput": list(_throughputs(cells, kinds)),
        "energy": [chart for block in blocks for chart in _metrics("energy", block, kinds)],
    }


def kinds_of(records: Iterable[Record]) -> Kinds:
    """The color index of each drafting method, in the order of the run."""
    methods = (record["method"] for record in records if record["method"] != "autoregressive")
    return {method: kind for kind, method in enumerate(dict.fromkeys(methods))}


# ---- speed-up


def _speedups(block: Block, kinds: Kinds) -> Iterator[Picture]:
    """A forest plot of all engines, and for each engine the speed-up against gamma, with a common y axis."""
    cells = list(chain(*block))
    largest = max((cell["speedup"] for cell in drafting(cells)), default=0.0)
    highs = [min(_end(cell, "speedup", "speedup_high"), 3 * largest) for cell in drafting(cells)]
    yield from _overview(cells, kinds)
    for engine in block:
        yield from _engine_speedups(engine, kinds, max(highs, default=0.0))


def _overview(cells: Sequence[Record], kinds: Kinds) -> Iterator[Rows]:
    lines = [
        Line(
            f"{cell['engine']} {cell['method']}, gamma {cell['gamma']}",
            cell["speedup"],
            _end(cell, "speedup", "speedup_low"),
            _end(cell, "speedup", "speedup_high"),
            kinds[cell["method"]],
            cell["predicted_speedup"],
        )
        for cell in fastest(cells)
    ]
    if lines:
        title = f"Speed-up over plain decoding, each method at its fastest gamma\n{names.about(cells[0])}"
        yield Rows(names.name("overview", cells[0], with_engine=False), title, "speed-up [95 %]", tuple(lines))


def _engine_speedups(cells: Sequence[Record], kinds: Kinds, y_max: float) -> Iterator[Chart]:
    """One engine's speed-ups and predictions against gamma, with plain decoding as a line."""
    measured = drafting(cells)
    if not measured:
        return
    place, ticks = _places(measured)
    predicted = {best.measured["method"]: best.predicted for best in best_gammas(measured)}
    series = [Series("plain decoding", (0.0, max(place.values())), (1.0, 1.0), -1, dashed=True)]
    for method, group in grouped(measured, "method").items():
        ordered = sorted(group, key=lambda cell: place[cell["gamma"]])
        low, high = (tuple(_end(cell, "speedup", f"speedup_{end}") for cell in ordered) for end in ("low", "high"))
        x, y = tuple(place[cell["gamma"]] for cell in ordered), tuple(cell["speedup"] for cell in ordered)
        series.append(Series(method, x, y, kinds[method], low, high, num_detached=_num_detached(ordered)))
        if method in predicted:
            gammas = tuple(map(float, range(len(predicted[method]))))
            label = f"{method}: {PREDICTED}"
            series.append(Series(label, gammas, predicted[method], kinds[method], dashed=True))
    title = f"Speed-up over plain decoding: {cells[0]['engine']}\n{names.about(cells[0])}"
    yield Chart(names.name("speedup", cells[0]), title, GAMMA, "speed-up", tuple(series), ticks=ticks, y_max=y_max)


def _places(cells: Sequence[Record]) -> tuple[dict[Any, float], tuple[tuple[float, str], ...]]:
    """Position of each gamma on the x axis, and the ticks; gammas that are not numbers come after the largest number.

    0 is plain decoding.
    """
    numbers = sorted({cell["gamma"] for cell in cells if _is_number(cell["gamma"])})
    others = list(dict.fromkeys(cell["gamma"] for cell in cells if not _is_number(cell["gamma"])))
    place = {gamma: float(gamma) for gamma in numbers}
    place |= {gamma: max(numbers, default=0) + index for index, gamma in enumerate(others, 1)}
    shown = dict.fromkeys((0, *numbers, *others))
    return place, tuple((float(place.get(gamma, 0)), str(gamma)) for gamma in shown)


def _is_number(gamma: Any) -> bool:
    """Whether gamma is a number; otherwise it is "auto" or the name of a tree."""
    return isinstance(gamma, int | float)


def _num_detached(ordered: Sequence[Record]) -> int:
    """The number of cells at the end whose gamma is not a number, after cells whose gamma is one."""
    return sum(not _is_number(cell["gamma"]) for cell in ordered) if _is_number(ordered[0]["gamma"]) else 0


def _end(cell: Record, name: str, end: str) -> float:
    """An end of a value's interval; the value itself if there is no interval, as with a single round."""
    return float(cell[name] if cell[end] is None else cell[end])


# ---- metrics against gamma, and acceptance by position


def _metrics(section: str, block: Block, kinds: Kinds) -> Iterator[Chart]:
    for metric in METRICS[section]:
        for engine in block:
            yield from _against_gamma(metric, engine, kinds)


def _against_gamma(metric: Metric, cells: Sequence[Record], kinds: Kinds) -> Iterator[Chart]:
    """A metric of one engine's cells, where known, with plain decoding as a line."""
    known = [cell for cell in cells if cell["method"] != "autoregressive" and metric.value(cell) is not None]
    if not known:
        return
    place, ticks = _places(known)
    ticks = ticks if metric.has_plain else ticks[1:]
    series = [_metric_series(metric, group, place, kinds) for group in grouped(known, "method").values()]
    plain = next((cell for cell in cells if cell["method"] == "autoregressive"), None)
    if metric.has_plain and plain and (value := metric.value(plain)) is not None:
        across = (0.0, max(place[cell["gamma"]] for cell in known))
        series.insert(0, Series("plain decoding", across, (value, value), -1, dashed=True))
    title = f"{metric.title}: {cells[0]['engine']}\n{names.about(cells[0])}"
    file = names.name(metric.name, cells[0])
    yield Chart(file, title, GAMMA, metric.label, tuple(series), ticks=ticks, y_max=metric.y_max)


def _metric_series(metric: Metric, cells: Sequence[Record], place: dict[Any, float], kinds: Kinds) -> Series:
    ordered = sorted(cells, key=lambda cell: place[cell["gamma"]])
    x, y = tuple(place[cell["gamma"]] for cell in ordered), tuple(metric.value(cell) or 0.0 for cell in ordered)
    method, low, high = cells[0]["method"], None, None
    if metric.low and metric.high and all(cell[metric.low] is not None for cell in ordered):
        low, high = tuple(cell[metric.low] for cell in ordered), tuple(cell[metric.high] for cell in ordered)
    return Series(method, x, y, kinds[method], low, high, num_detached=_num_detached(ordered))


def _acceptances(block: Block, kinds: Kinds) -> Iterator[Chart]:
    """Acceptance against gamma and, with a common y axis, by position."""
    yield from _metrics("acceptance", block, kinds)
    y_max = max((rate for cells in block for cell in cells for rate in cell["acceptance_rate_at"] or ()), default=0.0)
    for cells in block:
        yield from _by_position(cells, kinds, y_max)


def _by_position(cells: Sequence[Record], kinds: Kinds, y_max: float) -> Iterator[Chart]:
    """The cell with the longest fixed draft of each method; "auto" if it has no other."""
    series = []
    for method, group in grouped(cells, "method").items():
        longest = max(group, key=lambda cell: cell["gamma"] if _is_number(cell["gamma"]) else -1)
        rates = tuple(longest["acceptance_rate_at"] or ())
        if rates and method in kinds:
            x = tuple(float(position) for position in range(1, len(rates) + 1))
            series.append(Series(f"{method}, gamma {longest['gamma']}", x, rates, kinds[method]))
    if series:
        places = range(1, max(len(each.x) for each in series) + 1)
        ticks = tuple((float(place), str(place)) for place in places)
        title = f"Acceptance by draft position: {cells[0]['engine']}\n{names.about(cells[0])}"
        labels = ("draft position", "share of steps that accept it")
        yield Chart(names.name("acceptance", cells[0]), title, *labels, tuple(series), ticks=ticks, y_max=y_max)


# ---- throughput against latency


def _throughputs(cells: Sequence[Record], kinds: Kinds) -> Iterator[Chart]:
    """Charts of throughput against latency, per engine; a line joins several batch sizes."""
    known = [cell for cell in cells if cell["latency_s"] is not None and cell["throughput_tok_s"] is not None]
    for block in grouped(known, "pair", "workload", "placement", "engine").values():
        if len(block) < 2:
            continue
        joined = "gamma" if len({cell["batch_size"] for cell in block}) > 1 else "batch_size"
        series = [_throughput(group, kinds) for group in grouped(block, "method", joined).values()]
        title = f"Throughput vs. latency: {block[0]['engine']}\n{names.about(block[0], with_batch=False)}"
        file = names.name("throughput", block[0], with_batch=False)
        yield Chart(file, title, "latency, s per prompt", "tokens per second", tuple(series))


def _throughput(cells: Sequence[Record], kinds: Kinds) -> Series:
    method, gammas = cells[0]["method"], {cell["gamma"] for cell in cells}
    batch_sizes = {cell["batch_size"] for cell in cells}
    label = "plain decoding" if method == "autoregressive" else method
    points = tuple(f"gamma {cell['gamma']}, batch size {cell['batch_size']}" for cell in cells)
    x, y = (tuple(float(cell[name]) for cell in cells) for name in ("latency_s", "throughput_tok_s"))
    return Series(label, x, y, kinds.get(method, -1), line=len(batch_sizes) > 1 and len(gammas) == 1, names=points)
