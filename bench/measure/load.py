"""Open-loop load: statistics of requests, with the same definitions for every engine.

Open loop: a request arrives at its time whether or not earlier ones are finished, and waits if no slot is free. All
times of a request count from its arrival. Cells with the same seed have the same arrivals, at another rate only faster
or slower, so that methods meet the same load.

The fields of a record are declared in `bench.records.fields`. Percentiles are over all requests, of which those that
did not finish count as slower than any other: leaving them out would flatter an engine that stalls. Such a percentile
is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench.campaign.arrivals import Limits, Request
from bench.records.schema import PERCENTILES


def percentile(values: Sequence[float], percent: float) -> float | None:
    """A percentile by linear interpolation as in numpy; None if it is infinite.

    Raises ValueError if there are no values.
    """
    if not values:
        raise ValueError("values=[] must not be empty: there were no requests")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    between = below if below == above else below + (above - below) * (place - math.floor(place))
    return between if math.isfinite(between) else None


def summary(requests: Sequence[Request | None], duration_s: float, limits: Limits) -> dict[str, Any]:
    """Record fields computed from the requests; unfinished requests are None."""
    finished = [request for request in requests if request is not None]
    span_s = max([duration_s, *(request.arrival_s + request.latency_s for request in finished)])
    num_good = sum(map(limits.hold, finished))
    num_tokens = sum(request.num_tokens for request in finished)
    return {
        "num_requests": len(requests),
        "num_finished": len(finished),
        "num_tokens": num_tokens,
        "offered_rate": len(requests) / duration_s,
        "achieved_rate": len(finished) / span_s,
        "throughput_tok_s": num_tokens / span_s,
        "goodput": num_good / span_s,
        "within_limits_rate": num_good / len(requests),
        **_spread("ttft", [request.ttft_s for request in finished], len(requests)),
        **_spread("inter_token", _known([request.inter_token_s for request in finished]), _num_longer(requests)),
        **_spread("latency", [request.latency_s for request in finished], len(requests)),
        **_spread("queue", _known([request.queue_s for request in finished]), len(requests)),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _num_longer(requests: Sequence[Request | None]) -> int:
    """The number of requests that have, or might have had, more than one token."""
    return sum(request is None or request.num_tokens > 1 for request in requests)


def _spread(name: str, values: Sequence[float], num_requests: int) -> dict[str, float | None]:
    """The mean of the known values, and percentiles over all requests."""
    padded = [*values, *[math.inf] * (num_requests - len(values))]
    percentiles = {f"{name}_p{each}_s": percentile(padded, each) if values else None for each in PERCENTILES}
    return {f"{name}_s": fmean(values) if values else None, **percentiles}


def in_flight(spans: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """(mean, maximum) number of overlapping spans, from 0 to the last end.

    A span that ends when another starts does not overlap it.
    """
    end_s = max((end for _, end in spans), default=0.0)
    if not end_s:
        return 0.0, 0
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    number = largest = 0
    for _, change in changes:
        number += change
        largest = max(largest, number)
    return sum(end - start for start, end in spans) / end_s, largest
