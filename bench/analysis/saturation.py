"""The rate at which a server is saturated: the requests that it finishes per second while it cannot keep up."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from bench.records.batch_means import batch_means_interval
from bench.records.intervals import Interval
from bench.records.schema import Record


def saturation_rate(records: Sequence[Record]) -> Interval | None:
    """Requests per second that an engine and method can finish, with its interval; None if it was not saturated.

    records: of one engine and method at several rates. It is the mean over the highest rates, all of them saturated;
    their parts of the time are the observations. A saturated rate below one that is not was a false alarm.
    """
    overloaded: list[Record] = []
    for record in sorted(records, key=lambda record: record["rate"], reverse=True):
        if not record["is_saturated"]:
            break
        overloaded.append(record)
    parts = [part for record in overloaded for part in record["achieved_rate_by_part"]]
    return batch_means_interval(fmean(parts), parts) if parts else None
