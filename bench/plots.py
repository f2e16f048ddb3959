"""Pictures of results: what is in each is decided here as plain data, and drawn with matplotlib in `bench.drawing`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench import cost, phases
from bench.best_gamma import best_gammas

Record = dict[str, Any]
LEAST = "reading weights and cache alone"


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind. low, high: ends of their intervals, or None. dashed: computed, not measured.

    kind: series of the same kind have the same colour.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: int = 0
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over numbers. name: of its file. log_x, log_y: powers of two, or of ten where x has none.

    ticks: labels of places on the x axis, where the numbers themselves do not say it.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    ticks: tuple[tuple[float, str], ...] | None = None


@dataclass(frozen=True, slots=True)
class Bars:
    """Stacked bars, each of parts that add up to 1. bars: (label, note at its end, parts)."""

    name: str
    title: str
    x_label: str
    parts: tuple[str, ...]
    bars: tuple[tuple[str, str, tuple[float, ...]], ...]


def pictures(records: Sequence[Record]) -> list[Chart | Bars]:
    """All pictures of a run's records, as far as it has measured what they show."""
    costs = [record for record in records if "axis" in record]
    cells = [record for record in records if "axis" not in record and record.get("rate") is None]
    return [*_of_costs(costs), *_of_speedups(cells)]


def _of_costs(records: Sequence[Record]) -> Iterator[Chart | Bars]:
    by_axis = _grouped(records, "axis")
    for name, (title, x_label, y_label, labels) in _CHARTS.items():
        if measured := {axis: by_axis[axis] for axis in labels if axis in by_axis}:
            series = [
                line
                for kind, (axis, cells) in enumerate(measured.items())
                for line in _SERIES.get(name, _milliseconds)(cells, labels[axis], kind)
            ]
            yield Chart(name, f"{title}\n{_models(records[0])}", x_label, y_label, tuple(series), True, name in _LOG_Y)
    if steps := [record for record in records if record["axis"] in phases.SWEEPS]:
        bars = tuple(map(_bar, steps))
        title = f"Where the time of a decode step goes, gamma {phases.GAMMA}\n{_models(records[0])}"
        yield Bars("phases", title, "share of a step; at the end its duration", phases.PHASES, bars)


def _models(record: Record) -> str:
    return f"{record['pair']}, {record['dtype']} on {record['device']}"


# name: title, x axis, y axis, {axis of the sweep: label}
_CHARTS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "width": (
        f"A step by its width, behind {cost.CONTEXT} tokens",
        "tokens scored in a step",
        "ms per step",
        {"width": "one row"},
    ),
    "context": (
        "A step by its context",
        "tokens of context",
        "ms per step",
        {"context": "1 token", f"context-of-{cost.WIDTH}": f"{cost.WIDTH} tokens"},
    ),
    "batch": (
        f"Throughput by rows, each behind {cost.CONTEXT} tokens",
        "rows of a batch",
        "tokens scored per second",
        {"batch": "1 token in each row", f"batch-of-{cost.WIDTH}": f"{cost.WIDTH} tokens in each row"},
    ),
    "head": (
        f"A step of the draft head and one of its target, behind {cost.CONTEXT} tokens",
        "rows of a batch",
        "ms per step",
        {"batch": "target", "head": "head"},
    ),
    "vocabulary": (
        f"Sampling {cost.WIDTH} positions at temperature 1",
        "tokens of the vocabulary",
        "ms",
        {"vocabulary": "law and draw"},
    ),
    "ngram": (
        "Copies while a text grows",
        "length of the text at the end, in tokens",
        "µs per token",
        {"ngram": "prompt lookup", "suffix": "suffix tree"},
    ),
    "slots": (
        f"{cost.NUM_REQUESTS} requests through slots, plain decoding, prompts read in the same time",
        "slots",
        "tokens emitted per second",
        {"slots": "throughput"},
    ),
}
_LOG_Y = ("batch", "head", "vocabulary")


def _milliseconds(cells: Sequence[Record], label: str, kind: int) -> Iterator[Series]:
    x = tuple(float(cell["size"]) for cell in cells)
    yield Series(label, x, tuple(1e3 * cell["median_s"] for cell in cells), kind)
    if all(cell["roofline_s"] for cell in cells):
        yield Series(f"{label}: {LEAST}", x, tuple(1e3 * cell["roofline_s"] for cell in cells), kind, dashed=True)


def _tokens_per_second(cells: Sequence[Record], label: str, kind: int) -> Iterator[Series]:
    x = tuple(float(cell["size"]) for cell in cells)
    yield Series(label, x, tuple(cell["tokens"] / cell["median_s"] for cell in cells), kind)
    if all(cell["roofline_s"] for cell in cells):
        most = tuple(cell["tokens"] / cell["roofline_s"] for cell in cells)
        yield Series(f"{label}: {LEAST}", x, most, kind, dashed=True)


def _microseconds_per_token(cells: Sequence[Record], label: str, kind: int) -> Iterator[Series]:
    per_token = tuple(1e6 * cell["median_s"] / cell["tokens"] for cell in cells)
    yield Series(label, tuple(float(cell["size"]) for cell in cells), per_token, kind)


_SERIES = {"batch": _tokens_per_second, "slots": _tokens_per_second, "ngram": _microseconds_per_token}


def _bar(record: Record) -> tuple[str, str, tuple[float, ...]]:
    rows = f"{record['size']} row{'s' if record['size'] > 1 else ''}"
    shares = tuple(record[f"{phase}_share"] for phase in phases.PHASES)
    return f"{record['method']}, {_law(record)}, {rows}", f"{1e3 * record['step_s']:.1f} ms", shares


def _of_speedups(records: Sequence[Record]) -> Iterator[Chart]:
    speculative = [record for record in records if record["speedup"] is not None]
    for (engine, pair, workload, batch_size), cells in _grouped(speculative, *_BLOCK).items():
        name = re.sub(r"[^\w.-]+", "-", f"{engine}-{pair}-{workload}-batch-{batch_size}")
        about = f"{engine}, {_models(cells[0])}, {workload}, batch size {batch_size}, {_law(cells[0])}"
        yield _speedups(f"speedup-{name}", about, cells)
        if any(cell["acceptance_rate_at"] for cell in cells):
            yield _acceptance(f"acceptance-{name}", about, cells)


_BLOCK = ("engine", "pair", "workload", "batch_size")


def _speedups(name: str, about: str, cells: Sequence[Record]) -> Chart:
    """ "auto" stands one place behind the largest number."""
    numbers = sorted({cell["gamma"] for cell in cells if cell["gamma"] != "auto"})
    place = {gamma: float(gamma) for gamma in numbers} | {"auto": max(numbers, default=0) + 1.0}
    predicted = {best.measured["method"]: best.predicted for best in best_gammas(cells)}
    series = [Series("plain decoding", (0.0, max(place.values())), (1.0, 1.0), -1, dashed=True)]
    for kind, (method, group) in enumerate(_grouped(cells, "method").items()):
        ordered = sorted(group, key=lambda cell: place[cell["gamma"]])
        low, high = (tuple(_end(cell, end) for cell in ordered) for end in ("low", "high"))
        x, y = tuple(place[cell["gamma"]] for cell in ordered), tuple(cell["speedup"] for cell in ordered)
        series.append(Series(method, x, y, kind, low, high))
        if method in predicted:
            gammas = tuple(map(float, range(len(predicted[method]))))
            series.append(Series(f"{method}: predicted, prompt left out", gammas, predicted[method], kind, dashed=True))
    used = {gamma for cell in cells for gamma in (0, cell["gamma"])}
    ticks = tuple((place.get(gamma, 0.0), str(gamma)) for gamma in (0, *numbers, "auto") if gamma in used)
    title = f"Speed-up over plain decoding, with 95 % intervals\n{about}"
    return Chart(name, title, "gamma: tokens drafted per step", "speed-up", tuple(series), ticks=ticks)


def _end(cell: Record, end: str) -> float:
    """An end of the speed-up's interval; one round has none."""
    value = cell[f"speedup_{end}"]
    return float(cell["speedup"] if value is None else value)


def _acceptance(name: str, about: str, cells: Sequence[Record]) -> Chart:
    """Of the longest fixed drafts of each method; of "auto" where there are no others."""
    series = []
    for kind, (method, group) in enumerate(_grouped(cells, "method").items()):
        longest = max(group, key=lambda cell: -1 if cell["gamma"] == "auto" else cell["gamma"])
        rates = tuple(longest["acceptance_rate_at"] or ())
        if rates:
            x = tuple(float(position) for position in range(1, len(rates) + 1))
            series.append(Series(f"{method}, gamma {longest['gamma']}", x, rates, kind))
    places = range(1, max(len(each.x) for each in series) + 1)
    ticks = tuple((float(place), str(place)) for place in places)
    title = f"Acceptance by position\n{about}"
    return Chart(name, title, "position in the draft", "share of steps that accept it", tuple(series), ticks=ticks)


def _law(record: Record) -> str:
    return "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"


def _grouped(records: Sequence[Record], *names: str) -> dict[Any, list[Record]]:
    """By the value of a key, or the values of several."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        values = tuple(record[name] for name in names)
        groups.setdefault(values if len(names) > 1 else values[0], []).append(record)
    return groups
