"""Pictures of decoding: speed-ups, acceptance, where the time goes, throughput against latency, energy, load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from bench.analysis.best_gamma import best_gammas
from bench.analysis.break_even import ratios
from bench.records.grouping import WITHOUT_ENGINE, drafting, fastest, grouped
from bench.report.charts.model import Chart, Line, Picture, Rows, Series

Record = dict[str, Any]
Kinds = dict[Any, int]  # of each method, under load with its gamma: its colour, the same in all pictures of a run
GAMMA = "gamma: tokens drafted per step"


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a cell that is shown against gamma. value: of a record, in the unit of the label, or None.

    low, high: fields of its interval's ends. has_plain: whether plain decoding has it, too, as a line to compare with.
    most: of what can be.
    """

    name: str
    title: str
    label: str
    value: Callable[[Record], float | None]
    has_plain: bool = False
    most: float = 0.0
    low: str | None = None
    high: str | None = None


def _milliseconds_per(name: str, per: str | None) -> Callable[[Record], float | None]:
    """A time of the whole run in milliseconds, per something that was counted; None where one is not known."""

    def value(record: Record) -> float | None:
        if record[name] is None or (per is not None and not record[per]):
            return None
        return float(1e3 * record[name] / (record[per] if per else 1))

    return value


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: record[name]


METRICS = {
    "acceptance": (
        Metric(
            "acceptance-rate",
            "Acceptance rate",
            "accepted of the tokens drafted",
            _field("acceptance_rate"),
            most=1.0,
            low="acceptance_rate_low",
            high="acceptance_rate_high",
        ),
        Metric(
            "system-efficiency",
            "System efficiency",
            "emitted, over what a perfect draft would emit",
            # a draft of nothing is perfect, and tells nothing
            lambda record: record["system_efficiency"] if record["num_drafted"] else None,
            most=1.0,
        ),
    ),
    "time": (
        Metric(
            "draft-time",
            "Time per proposed token",
            "ms per proposed token",
            _milliseconds_per("draft_time_per_token_s", None),
        ),
        Metric(
            "scoring-time",
            "Scoring time",
            "ms in target forward passes, per emitted token",
            _milliseconds_per("scoring_time_s", "num_tokens"),
            True,
        ),
        Metric(
            "verification-time",
            "Verification time",
            "ms per emitted token",
            _milliseconds_per("verification_time_s", "num_tokens"),
            True,
        ),
        Metric("latency", "Latency", "s per prompt", _field("latency_s"), True),
    ),
    "energy": (
        Metric("energy-per-token", "Energy per emitted token", "J", _field("energy_per_token_j"), True),
        Metric("energy-per-accepted", "Energy per accepted token", "J", _field("energy_per_accepted_token_j")),
    ),
}


def sections(records: Sequence[Record]) -> dict[str, list[Picture]]:
    """Pictures of decoding and load cells, by what they are about."""
    loads = [record for record in records if record.get("rate") is not None]
    cells = [record for record in records if record.get("rate") is None]
    kinds = kinds_of(records)
    blocks = [list(grouped(block, "engine").values()) for block in grouped(cells, *WITHOUT_ENGINE).values()]
    overviews = [row for block in blocks for row in _overview([*chain(*block)], kinds)]
    speedups = [chart for block in blocks for engine in block for chart in _speedups(engine, kinds, _highest(block))]
    positions = [
        chart for block in blocks for engine in block for chart in _by_position(engine, kinds, _likeliest(block))
    ]
    by_metric: dict[str, list[Picture]] = {
        section: [
            chart
            for block in blocks
            for metric in metrics
            for engine in block
            for chart in _against_gamma(metric, engine, kinds)
        ]
        for section, metrics in METRICS.items()
    }
    return {
        "speedup": [*overviews, *speedups],
        "acceptance": [*by_metric["acceptance"], *positions],
        "time": by_metric["time"],
        "throughput": list(_throughputs(cells, kinds)),
        "load": list(_loads(loads)),
        "energy": by_metric["energy"],
    }


def kinds_of(records: Iterable[Record]) -> Kinds:
    """A number for each method that drafts, in the order of the run."""
    methods = (record["method"] for record in records if record["method"] != "autoregressive")
    return {method: kind for kind, method in enumerate(dict.fromkeys(methods))}


def _overview(cells: Sequence[Record], kinds: Kinds) -> Iterator[Rows]:
    """Each engine's methods at the gamma that was fastest, one below the other."""
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
        name = _name("overview", cells[0], with_engine=False)
        title = f"Each method at its fastest gamma, over the same engine's plain decoding\n{_about(cells[0])}"
        yield Rows(name, title, "speed-up", tuple(lines))


def _speedups(cells: Sequence[Record], kinds: Kinds, most: float) -> Iterator[Chart]:
    """One engine's, against gamma, with plain decoding and the predictions. most: of all engines beside it."""
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
        series.append(Series(method, x, y, kinds[method], low, high, num_loose=_num_loose(ordered)))
        if method in predicted:
            gammas = tuple(map(float, range(len(predicted[method]))))
            label = f"{method}: predicted, prompt left out"
            series.append(Series(label, gammas, predicted[method], kinds[method], dashed=True))
    title = f"Speed-up over plain decoding: {cells[0]['engine']}\n{_about(cells[0])}"
    yield Chart(_name("speedup", cells[0]), title, GAMMA, "speed-up", tuple(series), ticks=ticks, y_most=most)


def _highest(block: Sequence[Sequence[Record]]) -> float:
    """Of the speed-ups of some engines, with the ends of their intervals, but for those that are far longer."""
    measured = [cell for cells in block for cell in drafting(cells)]
    most = max((cell["speedup"] for cell in measured), default=0.0)
    return max((min(_end(cell, "speedup", "speedup_high"), 3 * most) for cell in measured), default=0.0)


def _likeliest(block: Sequence[Sequence[Record]]) -> float:
    """Of the acceptance at any place of any engine's drafts."""
    return max((rate for cells in block for cell in cells for rate in cell["acceptance_rate_at"] or ()), default=0.0)


def _places(cells: Sequence[Record]) -> tuple[dict[Any, float], tuple[tuple[float, str], ...]]:
    """Where each gamma stands on the axis, and its ticks; what is no number stands behind the largest one.

    0 is plain decoding.
    """
    numbers = sorted({cell["gamma"] for cell in cells if _is_number(cell["gamma"])})
    words = list(dict.fromkeys(cell["gamma"] for cell in cells if not _is_number(cell["gamma"])))
    place = {gamma: float(gamma) for gamma in numbers}
    place |= {word: max(numbers, default=0) + index for index, word in enumerate(words, 1)}
    shown = dict.fromkeys((0, *numbers, *words))
    return place, tuple((float(place.get(gamma, 0)), str(gamma)) for gamma in shown)


def _is_number(gamma: Any) -> bool:
    """Whether a gamma is one; others are "auto", or name what an engine does."""
    return isinstance(gamma, int | float)


def _end(cell: Record, name: str, end: str | None) -> float:
    """An end of a value's interval; without one, as of a single round, the value itself."""
    value = cell[end] if end else None
    return float(cell[name] if value is None else value)


def _against_gamma(metric: Metric, cells: Sequence[Record], kinds: Kinds) -> Iterator[Chart]:
    """A number of one engine's cells, as far as it is known, with plain decoding's as a line across."""
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
    title = f"{metric.title}: {cells[0]['engine']}\n{_about(cells[0])}"
    yield Chart(
        _name(metric.name, cells[0]), title, GAMMA, metric.label, tuple(series), ticks=ticks, y_most=metric.most
    )


def _metric_series(metric: Metric, cells: Sequence[Record], place: dict[Any, float], kinds: Kinds) -> Series:
    ordered = sorted(cells, key=lambda cell: place[cell["gamma"]])
    x, y = tuple(place[cell["gamma"]] for cell in ordered), tuple(metric.value(cell) or 0.0 for cell in ordered)
    method = cells[0]["method"]
    if metric.low is None or metric.high is None or any(cell[metric.low] is None for cell in cells):
        return Series(method, x, y, kinds[method], num_loose=_num_loose(ordered))
    low, high = (tuple(cell[end] for cell in ordered) for end in (metric.low, metric.high))
    return Series(method, x, y, kinds[method], low, high, num_loose=_num_loose(ordered))


def _num_loose(ordered: Sequence[Record]) -> int:
    """What is no number is not joined to what is."""
    return sum(not _is_number(cell["gamma"]) for cell in ordered) if _is_number(ordered[0]["gamma"]) else 0


def _by_position(cells: Sequence[Record], kinds: Kinds, most: float) -> Iterator[Chart]:
    """Of the longest fixed drafts of each method; of "auto" where there are no others."""
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
        title = f"Acceptance by position: {cells[0]['engine']}\n{_about(cells[0])}"
        x_label, y_label = "position in the draft", "share of steps that accept it"
        yield Chart(_name("acceptance", cells[0]), title, x_label, y_label, tuple(series), ticks=ticks, y_most=most)


def _throughputs(cells: Sequence[Record], kinds: Kinds) -> Iterator[Chart]:
    """Of each engine: batch sizes joined where there are several, else gammas."""
    known = [cell for cell in cells if cell["latency_s"] is not None and cell["throughput_tok_s"] is not None]
    for block in grouped(known, "pair", "workload", "placement", "engine").values():
        batch_sizes = {cell["batch_size"] for cell in block}
        if len(block) < 2:
            continue
        joined = "gamma" if len(batch_sizes) > 1 else "batch_size"
        series = [_throughput(group, kinds) for group in grouped(block, "method", joined).values()]
        title = f"Throughput against latency: {block[0]['engine']}\n{_about(block[0], with_batch=False)}"
        name = _name("throughput", block[0], with_batch=False)
        yield Chart(name, title, "latency, s per prompt", "tokens per second", tuple(series))


def _throughput(cells: Sequence[Record], kinds: Kinds) -> Series:
    method, gammas = cells[0]["method"], {cell["gamma"] for cell in cells}
    batch_sizes = {cell["batch_size"] for cell in cells}
    label = "plain decoding" if method == "autoregressive" else method
    names = tuple(f"gamma {cell['gamma']}, batch size {cell['batch_size']}" for cell in cells)
    x, y = (tuple(float(cell[name]) for cell in cells) for name in ("latency_s", "throughput_tok_s"))
    return Series(label, x, y, kinds.get(method, -1), line=len(batch_sizes) > 1 and len(gammas) == 1, names=names)


def _loads(records: Sequence[Record]) -> Iterator[Chart]:
    """Of each engine: how long requests take at each rate, what is done of them, and the one against the other."""
    arms = [arm for arm in grouped(records, "method", "gamma") if arm[0] != "autoregressive"]
    kinds = {arm: kind for kind, arm in enumerate(arms)}
    for block in grouped(records, "pair", "workload", "placement", "engine").values():
        about = f"{block[0]['engine']}\n{_about(block[0], with_batch=False)}"
        fields = percentiles(block)
        told = (*_pays(block, kinds), *_waits(block, fields, kinds), *_rates(block, kinds))
        for name, title, label, series in told:
            file = _name(f"load-{name}", block[0], with_batch=False)
            yield Chart(file, f"{title}: {about}", "requests arriving per second", label, tuple(series))
        if crossed := _crossed(block, fields, kinds):
            x_label = f"{next(iter(fields)).replace('_', ' ')} of half of the requests, s"
            file, title = _name("load-throughput", block[0], with_batch=False), "Throughput against latency, by rate"
            yield Chart(file, f"{title}: {about}", x_label, "tokens per second", tuple(crossed))


def _pays(block: Sequence[Record], kinds: Kinds) -> Iterator[_Told]:
    """Where speculation stops paying: median latency of plain decoding over a method's, at the same arrivals."""
    arms = grouped(block, "method", "gamma")
    curves = {arm: ratios(arms.get(("autoregressive", 0), []), found) for arm, found in arms.items()}
    series = []
    for (method, gamma), curve in curves.items():
        known = {rate: ratio for rate, ratio in curve.items() if ratio is not None}
        if known and method != "autoregressive":
            series.append(Series(_arm(method, gamma), tuple(known), tuple(known.values()), kinds[method, gamma]))
    if series:
        rates = [rate for each in series for rate in each.x]
        plain = Series("plain decoding", (min(rates), max(rates)), (1.0, 1.0), -1, dashed=True)
        title = "Up to which rate it pays"
        yield "pays", title, "median latency of plain decoding over the method's", [plain, *series]


def percentiles(records: Sequence[Record]) -> dict[str, dict[int, str]]:
    """Of load records: {what is told of every request: {percent: the field that says so}}; latency first."""
    found: dict[str, dict[int, str]] = {}
    for name in dict.fromkeys(name for record in records for name in record if record[name] is not None):
        if told := PERCENTILE.fullmatch(name):
            of, percent = told["of"] or told["behind"], int(told["before"] or told["percent"])
            found.setdefault(of, {})[percent] = name
    return dict(sorted(found.items(), key=lambda item: item[0] != "latency"))


# latency_p95_s, latency_s_p95, p95_latency_s: all are read
PERCENTILE = re.compile(r"(?:(?P<of>\w+?)(?:_s)?_p(?P<percent>\d\d)(?:_s)?|p(?P<before>\d\d)_(?P<behind>\w+?)(?:_s)?)")
_WAITS = {"ttft": "Time to first token", "inter_token": "Time between tokens", "queue": "Wait for a slot"}
_Told = tuple[str, str, str, list[Series]]  # name, title, label of the y axis, series


def _waits(block: Sequence[Record], fields: dict[str, dict[int, str]], kinds: Kinds) -> Iterator[_Told]:
    """A chart for each thing that is told of every request: half of them as lines, 95 of 100 dashed."""
    for of, by_percent in fields.items():
        shown = {percent: by_percent[percent] for percent in sorted({min(by_percent), max(by_percent)})}
        series = [
            line
            for percent, name in shown.items()
            for line in _by_rate(block, name, kinds, f": {percent} % of requests", dashed=percent != min(shown))
        ]
        if series:
            yield of, f"{_WAITS.get(of, of.replace('_', ' ').capitalize())} by rate", "seconds", series


def _rates(block: Sequence[Record], kinds: Kinds) -> Iterator[_Told]:
    """A chart for each thing that is done in a second."""
    labels = {"goodput": "requests per second within the limits", "throughput_tok_s": "tokens per second"}
    for name in dict.fromkeys(name for record in block for name in record):
        label = next((label for start, label in labels.items() if name.startswith(start)), None)
        if label and (series := _by_rate(block, name, kinds)):
            yield name, f"{name.removesuffix('_tok_s').replace('_', ' ').capitalize()} by rate", label, series


def _by_rate(
    block: Sequence[Record], name: str, kinds: Kinds, suffix: str = "", *, dashed: bool = False
) -> list[Series]:
    """A number against the rate, for each method and gamma."""
    known = [record for record in block if isinstance(record.get(name), int | float)]
    series = []
    for (method, gamma), group in grouped(known, "method", "gamma").items():
        ordered = sorted(group, key=lambda record: record["rate"])
        x, y = (tuple(float(record[each]) for record in ordered) for each in ("rate", name))
        series.append(Series(_arm(method, gamma) + suffix, x, y, kinds.get((method, gamma), -1), dashed=dashed))
    return series


def _crossed(block: Sequence[Record], fields: dict[str, dict[int, str]], kinds: Kinds) -> list[Series]:
    """Throughput against what half of the requests take at the most, rates joined."""
    name = next((by_percent[min(by_percent)] for by_percent in fields.values()), "")
    known = [each for each in block if each.get(name) is not None and each.get("throughput_tok_s") is not None]
    series = []
    for (method, gamma), group in grouped(known, "method", "gamma").items():
        ordered = sorted(group, key=lambda record: record["rate"])
        x, y = (tuple(float(record[each]) for record in ordered) for each in (name, "throughput_tok_s"))
        names = tuple(f"{record['rate']:g} requests/s" for record in ordered)
        series.append(Series(_arm(method, gamma), x, y, kinds.get((method, gamma), -1), names=names))
    return series


def _arm(method: str, gamma: Any) -> str:
    return "plain decoding" if method == "autoregressive" else f"{method}, gamma {gamma}"


def _about(record: Record, *, with_batch: bool = True) -> str:
    """Of which models and prompts a picture is."""
    parts = [
        models(record),
        record["workload"],
        *([f"batch size {record['batch_size']}"] if with_batch else []),
        *([f"placed {record['placement']}"] if record.get("placement", "same") != "same" else []),
        distribution(record),
    ]
    return ", ".join(map(str, parts))


def _name(kind: str, record: Record, *, with_engine: bool = True, with_batch: bool = True) -> str:
    """Of a picture's file."""
    parts = [kind, *([record["engine"]] if with_engine else []), record["pair"], record["workload"]]
    parts += [f"batch-{record['batch_size']}"] if with_batch else []
    parts += [record["placement"]] if record.get("placement", "same") != "same" else []
    return file_name("-".join(map(str, parts)))


def file_name(text: str) -> str:
    """Text as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", text)


def models(record: Record) -> str:
    return f"{record['pair']}, {record['dtype']} on {record['device']}"


def distribution(record: Record) -> str:
    return "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"
