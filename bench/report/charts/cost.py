"""Charts of the cost sweep: the time of a step against its size on each axis, and its phases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records import grouping, phases
from bench.records.sweeps import CONTEXT, NUM_REQUESTS, WIDTH
from bench.report.charts import names
from bench.report.charts.model import Bars, Chart, Series

Record = dict[str, Any]
ROOFLINE = "roofline (reading weights and cache)"


def _milliseconds(record: Record, seconds: float) -> float:
    return 1e3 * seconds


def _tokens_per_second(record: Record, seconds: float) -> float:
    return float(record["tokens"] / seconds)


def _microseconds_per_token(record: Record, seconds: float) -> float:
    return float(1e6 * seconds / record["tokens"])


@dataclass(frozen=True, slots=True)
class Sweep:
    """A chart of one or several axes. labels: one per axis. value: the shown value of a record and its time."""

    title: str
    x_label: str
    y_label: str
    labels: dict[str, str]
    value: Callable[[Record, float], float] = _milliseconds
    log_y: bool = False


SWEEPS = {
    "width": Sweep(
        f"Step time by width, {CONTEXT} tokens of context",
        "width, tokens scored in a step",
        "ms per step",
        {"width": "one sequence", "tree": "token tree, drafted and scored"},
    ),
    "context": Sweep(
        "Step time by context length",
        "context length, tokens",
        "ms per step",
        {"context": "1 token", f"context-of-{WIDTH}": f"{WIDTH} tokens"},
    ),
    "batch": Sweep(
        f"Throughput by batch size, {CONTEXT} tokens of context each",
        "batch size",
        "tokens scored per second",
        {"batch": "1 token per sequence", f"batch-of-{WIDTH}": f"{WIDTH} tokens per sequence"},
        _tokens_per_second,
        log_y=True,
    ),
    "head": Sweep(
        f"Step time of the draft head and its target, {CONTEXT} tokens of context",
        "batch size",
        "ms per step",
        {"batch": "target", "head": "draft head"},
        log_y=True,
    ),
    "vocabulary": Sweep(
        f"Sampling {WIDTH} positions at temperature 1",
        "vocabulary size",
        "ms",
        {"vocabulary": "distribution and draw"},
        log_y=True,
    ),
    "ngram": Sweep(
        "Lookup time while the text grows",
        "text length at the end, tokens",
        "µs per token",
        {"ngram": "prompt lookup", "suffix": "suffix tree"},
        _microseconds_per_token,
    ),
    "slots": Sweep(
        f"Continuous batching: {NUM_REQUESTS} requests, plain decoding, prefill included",
        "slots",
        "tokens emitted per second",
        {"slots": "throughput"},
        _tokens_per_second,
    ),
}


def charts(records: Sequence[Record]) -> Iterator[Chart | Bars]:
    by_axis = grouping.grouped(records, "axis")
    about = names.models(records[0]) if records else ""
    for name, sweep in (SWEEPS | _unknown(by_axis)).items():
        measured = [axis for axis in sweep.labels if axis in by_axis]
        if series := [line for kind, axis in enumerate(measured) for line in _series(sweep, axis, by_axis[axis], kind)]:
            title = f"{sweep.title}\n{about}"
            yield Chart(name, title, sweep.x_label, sweep.y_label, tuple(series), True, sweep.log_y)
    if steps := [record for record in records if record["axis"] in phases.SWEEPS]:
        title = f"Phases of a decode step, gamma {phases.GAMMA}\n{about}"
        yield Bars("phases", title, "share of a decode step", phases.PHASES, tuple(map(_bar, steps)))


def _unknown(axes: Collection[str]) -> dict[str, Sweep]:
    """Charts of axes that have none of their own."""
    known = {axis for sweep in SWEEPS.values() for axis in sweep.labels} | set(phases.SWEEPS)
    return {
        names.file_name(axis): Sweep(f"Cost of {axis}", f"size of {axis}", "ms", {axis: axis})
        for axis in axes
        if axis not in known
    }


def _series(sweep: Sweep, axis: str, records: Sequence[Record], kind: int) -> Iterator[Series]:
    """The measurement and, if known, the roofline."""
    sizes = tuple(float(record["size"]) for record in records)
    label = sweep.labels[axis]
    yield Series(label, sizes, tuple(sweep.value(record, record["median_s"]) for record in records), kind)
    if all(record["roofline_s"] for record in records):
        roofline = tuple(sweep.value(record, record["roofline_s"]) for record in records)
        yield Series(f"{label}: {ROOFLINE}", sizes, roofline, kind, dashed=True)


def _bar(record: Record) -> tuple[str, str, tuple[float, ...]]:
    batch = f"batch size {record['size']}"
    shares = tuple(record[f"{phase}_share"] for phase in phases.PHASES)
    return f"{record['method']}, {names.distribution(record)}, {batch}", f"{1e3 * record['step_s']:.1f} ms", shares
