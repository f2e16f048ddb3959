"""The request rate up to which speculation pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def ratios(plain: Sequence[dict[str, Any]], method: Sequence[dict[str, Any]]) -> dict[float, float | None]:
    """By rate: median latency of plain decoding over that of a method, None if unknown; above 1 the method pays."""
    plain_s = {record["rate"]: record.get("latency_p50_s") for record in plain}
    method_s = {record["rate"]: record.get("latency_p50_s") for record in method}
    both = [(rate, plain_s[rate], method_s[rate]) for rate in sorted(plain_s.keys() & method_s.keys())]
    return {rate: slower / faster if slower and faster else None for rate, slower, faster in both}


def pays(plain: Sequence[dict[str, Any]], method: Sequence[dict[str, Any]]) -> dict[float, bool | None]:
    """By rate: whether the median latency of a method is below that of plain decoding.

    An unknown median (half of the requests did not finish) is longer than any other; None if neither is known.
    """
    plain_s = {record["rate"]: record["latency_p50_s"] or math.inf for record in plain}
    method_s = {record["rate"]: record["latency_p50_s"] or math.inf for record in method}
    return {
        rate: method_s[rate] < plain_s[rate] if min(method_s[rate], plain_s[rate]) < math.inf else None
        for rate in sorted(plain_s.keys() & method_s.keys())
    }


def stops_paying(paid: dict[float, bool | None]) -> tuple[float | None, float | None]:
    """The rates between which a method stops paying: the last one at which it and all lower ones pay, and the next.

    The first is None if it pays at none, the second if it never stops; rates with unknown latencies are skipped.
    """
    last = None
    for rate, is_paid in sorted(paid.items()):
        if is_paid is False:
            return last, rate
        last = rate if is_paid else last
    return last, None


def highest_rate(records: Sequence[dict[str, Any]], percent: int) -> float | None:
    """The highest rate up to which the given percentage of requests kept the limits; None if there is none."""
    highest = None
    for record in sorted(records, key=lambda record: record["rate"]):
        if record["within_limits_rate"] < percent / 100:
            break
        highest = record["rate"]
    return highest
