"""Charts of all records of a run, those of the cost sweep among them, as plain data for the renderers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from bench.records import grouping, phases, sweeps
from bench.report.charts import decoding
from bench.report.charts.model import Bars, Chart, Line, Picture, Rows, Series

__all__ = ["Bars", "Chart", "Line", "Picture", "Rows", "Series", "pictures", "sections"]

Record = dict[str, Any]
MEMORY_BOUND = "reading weights and cache alone"


def pictures(records: Sequence[Record]) -> list[Picture]:
    """All pictures of a run's records, as far as it has measured what they show."""
    return [picture for section in sections(records).values() for picture in section]


def sections(records: Sequence[Record]) -> dict[str, list[Picture]]:
    """The same by what they are about, in the order of a report."""
    costs = [record for record in records if record.get("axis") is not None]
    others = [record for record in records if record.get("axis") is None]
    return {**decoding.sections(others), "cost": list(_of_costs(costs))}


def _of_costs(records: Sequence[Record]) -> Iterator[Chart | Bars]:
    by_axis = grouping.grouped(records, "axis")
    about = decoding.models(records[0]) if records else ""
    for name, (title, x_label, y_label, labels) in (_CHARTS | _unknown(by_axis)).items():
        if measured := {axis: by_axis[axis] for axis in labels if axis in by_axis}:
            series = [
                line
                for kind, (axis, cells) in enumerate(measured.items())
                for line in _SERIES.get(name, _milliseconds)(cells, labels[axis], kind)
            ]
            yield Chart(name, f"{title}\n{about}", x_label, y_label, tuple(series), True, name in _LOG_Y)
    if steps := [record for record in records if record["axis"] in phases.SWEEPS]:
        title = f"Where the time of a decode step goes, gamma {phases.GAMMA}\n{about}"
        yield Bars("phases", title, "share of a step; at the end its duration", phases.PHASES, tuple(map(_bar, steps)))


def _unknown(axes: Collection[str]) -> dict[str, tuple[str, str, str, dict[str, str]]]:
    """Charts of axes that have none of their own."""
    known = {axis for *_, labels in _CHARTS.values() for axis in labels} | set(phases.SWEEPS)
    return {
        decoding.file_name(axis): (f"Cost of {axis}", f"size of {axis}", "ms", {axis: axis})
        for axis in axes
        if axis not in known
    }


# name: title, x axis, y axis, {axis of the sweep: label}
_CHARTS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "width": (
        f"A step by its width, behind {sweeps.CONTEXT} tokens",
        "tokens scored in a step",
        "ms per step",
        {"width": "one row", "tree": "a tree, drawn and scored"},
    ),
    "context": (
        "A step by its context",
        "tokens of context",
        "ms per step",
        {"context": "1 token", f"context-of-{sweeps.WIDTH}": f"{sweeps.WIDTH} tokens"},
    ),
    "batch": (
        f"Throughput by rows, each behind {sweeps.CONTEXT} tokens",
        "rows of a batch",
        "tokens scored per second",
        {"batch": "1 token in each row", f"batch-of-{sweeps.WIDTH}": f"{sweeps.WIDTH} tokens in each row"},
    ),
    "head": (
        f"A step of the draft head and one of its target, behind {sweeps.CONTEXT} tokens",
        "rows of a batch",
        "ms per step",
        {"batch": "target", "head": "head"},
    ),
    "vocabulary": (
        f"Sampling {sweeps.WIDTH} positions at temperature 1",
        "tokens of the vocabulary",
        "ms",
        {"vocabulary": "distribution and draw"},
    ),
    "ngram": (
        "Copies while a text grows",
        "length of the text at the end, in tokens",
        "µs per token",
        {"ngram": "prompt lookup", "suffix": "suffix tree"},
    ),
    "slots": (
        f"{sweeps.NUM_REQUESTS} requests through slots, plain decoding, prompts read in the same time",
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
        yield Series(
            f"{label}: {MEMORY_BOUND}", x, tuple(1e3 * cell["roofline_s"] for cell in cells), kind, dashed=True
        )


def _tokens_per_second(cells: Sequence[Record], label: str, kind: int) -> Iterator[Series]:
    x = tuple(float(cell["size"]) for cell in cells)
    yield Series(label, x, tuple(cell["tokens"] / cell["median_s"] for cell in cells), kind)
    if all(cell["roofline_s"] for cell in cells):
        most = tuple(cell["tokens"] / cell["roofline_s"] for cell in cells)
        yield Series(f"{label}: {MEMORY_BOUND}", x, most, kind, dashed=True)


def _microseconds_per_token(cells: Sequence[Record], label: str, kind: int) -> Iterator[Series]:
    per_token = tuple(1e6 * cell["median_s"] / cell["tokens"] for cell in cells)
    yield Series(label, tuple(float(cell["size"]) for cell in cells), per_token, kind)


_SERIES = {"batch": _tokens_per_second, "slots": _tokens_per_second, "ngram": _microseconds_per_token}


def _bar(record: Record) -> tuple[str, str, tuple[float, ...]]:
    rows = f"{record['size']} row{'s' if record['size'] > 1 else ''}"
    shares = tuple(record[f"{phase}_share"] for phase in phases.PHASES)
    return f"{record['method']}, {decoding.distribution(record)}, {rows}", f"{1e3 * record['step_s']:.1f} ms", shares
