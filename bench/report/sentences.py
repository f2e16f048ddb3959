"""Conclusions from several records, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.analysis.break_even import break_even, highest_rate, pays, speedups, stops_paying
from bench.analysis.saturation import saturation_rate
from bench.records.grouping import grouped
from bench.records.intervals import Interval
from bench.records.schema import PERCENTILES, Record
from bench.report.format import interval


def load_verdicts(block: Sequence[Record]) -> Iterator[str]:
    """The rates at which each method and gamma of an engine keeps the limits, is saturated and pays; plain one first.

    block: at several rates, or with several numbers of clients.
    """
    plain = [record for record in block if record["method"] == "autoregressive"]
    if plain:
        yield f"plain decoding: {'; '.join(_of_arm(plain))}"
    for (method, gamma), records in grouped(block, "method", "gamma").items():
        if method != "autoregressive":
            yield f"{method} {gamma}: {'; '.join([*_of_arm(records), *_compared(plain, records)])}"


def _of_arm(records: Sequence[Record]) -> Iterator[str]:
    yield _limits(records)
    if records[0]["rate"] is not None and (found := saturation_rate(records)):
        yield f"saturated at {interval(found)} requests/s"


def _compared(plain: Sequence[Record], records: Sequence[Record]) -> Iterator[str]:
    unit = _UNITS[records[0]["rate"] is not None]
    if paid := pays(plain, records):
        yield _pays(*stops_paying(paid), unit)
    if found := break_even(speedups(plain, records)):
        yield f"stops paying at {_break_even(found)} {unit}, by interpolation"


_UNITS = {True: "requests/s", False: "clients"}


def _break_even(found: Interval) -> str:
    high = "no end" if found.high is None else f"{found.high:.3g}"
    return f"{found.estimate:.3g} [{found.low or 0:.3g}, {high}]"


def _limits(records: Sequence[Record]) -> str:
    rates = {percent: highest_rate(records, percent) for percent in PERCENTILES}
    kept = (f"{percent} % up to {'no rate' if rate is None else f'{rate:g}'}" for percent, rate in rates.items())
    return f"limits kept by {', '.join(kept)}"


def _pays(last: float | None, first: float | None, unit: str) -> str:
    """Break-even. last, first: the last level at which a method pays, and the first at which it does not."""
    if first is not None:
        return f"does not pay at {first:g} {unit}{'' if last is None else f', does at {last:g}'}"
    return "too few requests finished to tell whether it pays" if last is None else f"pays up to {last:g} {unit}"


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
