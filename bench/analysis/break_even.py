"""Where speculation pays under load, by the ratio of median latencies at the same rate or number of clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.records.batch_means import batch_ratio_interval, groups
from bench.records.intervals import Interval, unpaired_ratio_interval
from bench.records.schema import Record

Curve = dict[float, Interval | None]  # by rate or number of clients


def level(record: Record) -> float:
    """The rate of a load, or the number of clients of a closed loop."""
    return float(record["rate"] if record["rate"] is not None else record["concurrency"])


def speedups(plain: Sequence[Record], method: Sequence[Record]) -> Curve:
    """By level: median latency of plain decoding over that of a method, None if unknown; above 1 the method pays.

    Intervals are from consecutive groups of the requests in the steady window: of their ratios if the arrivals are the
    same, else of both arms' medians (Welch). There are none where an arm is saturated, as its latency is not steady.
    """
    others = {level(record): record for record in plain}
    both = [(others[level(record)], record) for record in sorted(method, key=level) if level(record) in others]
    return {level(record): _speedup(other, record) for other, record in both}


def _speedup(plain: Record, method: Record) -> Interval | None:
    slower, faster = plain["latency_p50_s"], method["latency_p50_s"]
    if not slower or not faster:
        return None
    latencies = [_steady(plain), _steady(method)]
    if None in latencies or plain["is_saturated"] or method["is_saturated"]:
        return Interval(slower / faster, None, None)
    medians = [[median(group) for group in groups(each or ())] for each in latencies]
    if plain["per_request_arrival_s"] == method["per_request_arrival_s"]:
        ratios = [above / below for above, below in zip(*medians, strict=True)]
        return batch_ratio_interval(slower / faster, ratios)
    found = unpaired_ratio_interval(*medians)
    factor = slower / faster / found.estimate  # the interval is around the ratio of all requests' medians
    low, high = (None if end is None else end * factor for end in (found.low, found.high))
    return Interval(slower / faster, low, high)


def _steady(record: Record) -> list[float] | None:
    """Latencies of the requests in the steady window, in order; None if unknown or if one did not finish."""
    columns = [record.get(f"per_request_{name}") for name in ("arrival_s", "latency_s")]
    start_s, end_s = record.get("window_start_s"), record.get("window_end_s")
    if None in columns or start_s is None or end_s is None:
        return None
    found = [latency for at, latency in zip(*columns, strict=True) if start_s <= at < end_s]
    return found if found and all(found) else None


def pays(plain: Sequence[Record], method: Sequence[Record]) -> dict[float, bool | None]:
    """By level: whether the median latency of a method is below that of plain decoding.

    An unknown median (half of the requests did not finish) is longer than any other; None if neither is known.
    """
    plain_s = {level(record): record["latency_p50_s"] or math.inf for record in plain}
    method_s = {level(record): record["latency_p50_s"] or math.inf for record in method}
    return {
        each: method_s[each] < plain_s[each] if min(method_s[each], plain_s[each]) < math.inf else None
        for each in sorted(plain_s.keys() & method_s.keys())
    }


def stops_paying(paid: dict[float, bool | None]) -> tuple[float | None, float | None]:
    """The levels between which a method stops paying: the last one at which it and all lower ones pay, and the next.

    The first is None if it pays at none, the second if it never stops; levels with unknown latencies are skipped.
    """
    last = None
    for each, is_paid in sorted(paid.items()):
        if is_paid is False:
            return last, each
        last = each if is_paid else last
    return last, None


def break_even(curve: Curve) -> Interval | None:
    """The level at which a method stops paying, between measured ones, with the levels at which its interval's ends do.

    The lower end is where the interval begins to include 1, 0 if it always does; the upper end is where it excludes 1
    from then on, None if it never does. Ratios without an interval count as their own ends.
    None if the method pays, or does not pay, at all levels.
    """
    known = {at: each for at, each in curve.items() if each is not None}
    found = _crossing([(at, each.estimate) for at, each in known.items()])
    if not found:
        return None
    low = _crossing([(at, each.estimate if each.low is None else each.low) for at, each in known.items()])
    high = _crossing([(at, each.estimate if each.high is None else each.high) for at, each in known.items()])
    return Interval(found, low, high)


def _crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Where a ratio first falls to 1 or below, linear in logarithms; 0 if it starts there, None if it never does."""
    before: tuple[float, float] | None = None
    for at, ratio in sorted(points):
        if ratio <= 1:
            if before is None:
                return 0.0
            share = math.log(before[1]) / (math.log(before[1]) - math.log(ratio))
            return float(before[0] * (at / before[0]) ** share)
        before = at, ratio
    return None


def highest_rate(records: Sequence[dict[str, Any]], percent: int) -> float | None:
    """The highest level up to which the given percentage of requests kept the limits; None if there is none."""
    highest = None
    for record in sorted(records, key=level):
        if record["within_limits_rate"] < percent / 100:
            break
        highest = level(record)
    return highest
