"""Charts of the acceptance length over the position in a text and over the minutes of service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.analysis.break_even import level
from bench.records.grouping import BLOCK, fastest, grouped
from bench.report.charts import names
from bench.report.charts.model import Chart, Series

Record = dict[str, Any]
LENGTH = "tokens per step"
SECONDS = 60


def over_text(cells: Sequence[Record], kinds: Mapping[str, int]) -> Iterator[Chart]:
    """The acceptance length by position, for each engine and the fastest gamma of each method.

    A point is at the middle of its bin. kinds: method -> color.
    """
    known = [cell for cell in cells if cell.get("acceptance_length_over_text") and cell["num_drafted"]]
    for block in grouped(known, *BLOCK).values():
        series = []
        for cell in fastest(block) or block:
            width, lengths = cell["text_bin_tokens"], cell["acceptance_length_over_text"]
            x, y = _known([(index + 0.5) * width for index in range(len(lengths))], lengths)
            series.append(Series(names.arm(cell["method"], cell["gamma"]), x, y, kinds.get(cell["method"], -1)))
        title = f"Acceptance length over the text: {block[0]['engine']}\n{names.about(block[0])}"
        file = names.name("acceptance-text", block[0])
        yield Chart(file, title, "position in the text, tokens, prompt included", LENGTH, tuple(series))


def over_service(loads: Sequence[Record], kinds: Mapping[str, int]) -> Iterator[Chart]:
    """The acceptance length by the arrival of requests, for each engine and method at its highest rate or most clients.

    A point is at the middle of its part of the time. kinds: method -> color.
    """
    known = [load for load in loads if load.get("acceptance_length_over_service")]
    for block in grouped(known, *BLOCK).values():
        series = []
        for load in _highest(block):
            lengths = load["acceptance_length_over_service"]
            part_min = load["duration_s"] / SECONDS / len(lengths)
            x, y = _known([(index + 0.5) * part_min for index in range(len(lengths))], lengths)
            label = f"{names.arm(load['method'], load['gamma'])}, {level(load):g} {_unit(load)}"
            series.append(Series(label, x, y, kinds.get(load["method"], -1)))
        title = f"Acceptance length over the time of service: {block[0]['engine']}\n{names.about(block[0])}"
        file = names.name("acceptance-service", block[0])
        yield Chart(file, title, "arrival of the request, minutes", LENGTH, tuple(series))


def _highest(loads: Sequence[Record]) -> list[Record]:
    """Of each method and gamma the load at the highest rate, and that of the most clients."""
    highest: dict[Any, Record] = {}
    for load in loads:
        arm = load["method"], load["gamma"], _unit(load)
        highest[arm] = max(highest.get(arm, load), load, key=level)
    return list(highest.values())


def _unit(load: Record) -> str:
    return "requests/s" if load.get("rate") is not None else "clients"


def _known(places: Sequence[float], lengths: Sequence[float | None]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coordinates of the parts in which there was a step."""
    pairs = [(place, length) for place, length in zip(places, lengths, strict=True) if length is not None]
    return tuple(place for place, _ in pairs), tuple(length for _, length in pairs)
