"""Conclusions from several records, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.analysis.break_even import highest_rate, pays, stops_paying
from bench.records.grouping import grouped
from bench.records.schema import PERCENTILES, Record


def load_verdicts(block: Sequence[Record]) -> Iterator[str]:
    """The rate up to which each method and gamma of an engine keeps the limits and pays; plain decoding first."""
    plain = [record for record in block if record["method"] == "autoregressive"]
    if plain:
        yield f"plain decoding: {_limits(plain)}"
    for (method, gamma), records in grouped(block, "method", "gamma").items():
        if method != "autoregressive":
            paid = pays(plain, records)
            yield f"{method} {gamma}: {_limits(records)}" + (f"; {_pays(*stops_paying(paid))}" if paid else "")


def _limits(records: Sequence[Record]) -> str:
    rates = {percent: highest_rate(records, percent) for percent in PERCENTILES}
    kept = (f"{percent} % up to {'no rate' if rate is None else f'{rate:g}'}" for percent, rate in rates.items())
    return f"limits kept by {', '.join(kept)}"


def _pays(last: float | None, first: float | None) -> str:
    """Break-even. last, first: the last rate at which a method pays, and the first at which it does not."""
    if first is not None:
        return f"does not pay at {first:g} requests/s{'' if last is None else f', does at {last:g}'}"
    return "too few requests finished to tell whether it pays" if last is None else f"pays up to {last:g} requests/s"


def tree_gain(costs: Sequence[Record]) -> str:
    """The best tree by its cost and the measured acceptance of the draft's nodes, and the largest tree that pays."""
    trees = [record for record in costs if record["axis"] == "tree"]
    plain = next((record for record in costs if (record["axis"], record["size"]) == ("width", 1)), None)
    if not trees or not plain:
        return ""
    speedups = [each["expected_tokens"] * plain["median_s"] / each["median_s"] for each in trees]
    speedup, best = max(zip(speedups, trees, strict=True), key=lambda pair: pair[0])
    paying = [each["size"] for speedup, each in zip(speedups, trees, strict=True) if speedup > 1]
    largest = f"the largest measured tree that pays has {max(paying)}" if paying else "no measured tree pays"
    return (
        f"The best tree has {best['size']} nodes in {best['depth']} levels and should be {speedup:.2f} times as "
        f"fast as plain decoding; {largest}."
    )


def overheads(cells: Sequence[Record]) -> Iterator[str]:
    """Time spent outside the models."""
    if rates := [100 * rate for cell in cells if (rate := cell["overhead_rate"]) is not None]:
        yield f"Outside model forwards: {min(rates):.1f} to {max(rates):.1f} % of the time."
    if recording_s := sum(cell["recording_time_s"] or 0 for cell in cells):
        yield f"Of the time measured {recording_s:.1f} s went into recording shapes for the device."
