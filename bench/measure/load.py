"""Load: statistics of requests, with the same definitions for every engine.

Open loop: a request arrives at its time whether or not earlier ones are finished, and waits if no slot is free. Closed
loop: a number of clients each send the next request after the answer to the one before. All times of a request count
from its arrival. Cells with the same seed have the same arrivals, at another rate only faster or slower, so that
methods meet the same load.

Statistics are those of the steady state: of the requests that arrive within the window, and of what is emitted and
finished within it; those before warm the server up, and those after keep it as busy until the last ones are finished.

The fields of a record are declared in `bench.records.fields`. Percentiles are over all requests of the window, of which
those that did not finish count as slower than any other: leaving them out would flatter an engine that stalls. Such a
percentile is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from bench.campaign.arrivals import Limits, Request
from bench.records.batch_means import NUM_PARTS, batch_means_interval, groups, latency_growth
from bench.records.intervals import Interval
from bench.records.schema import PERCENTILES

MAX_REFUSED = 0.05  # of the requests; with more the server does not keep up


@dataclass(frozen=True, slots=True)
class Window:
    """The steady part of a load, in seconds from its start; the end is not part of it."""

    start_s: float
    end_s: float

    def __contains__(self, time_s: float) -> bool:
        return self.start_s <= time_s < self.end_s

    @property
    def length_s(self) -> float:
        return self.end_s - self.start_s

    def overlap_s(self, start_s: float, end_s: float) -> float:
        """The part of a span that lies within it."""
        return max(0.0, min(end_s, self.end_s) - max(start_s, self.start_s))

    def parts(self) -> list[Window]:
        """Consecutive parts of equal length."""
        ends = [self.start_s + self.length_s * part / NUM_PARTS for part in range(NUM_PARTS + 1)]
        return [Window(start, end) for start, end in pairwise(ends)]


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


def summary(
    arrivals_s: Sequence[float], requests: Sequence[Request | None], window: Window, limits: Limits
) -> dict[str, Any]:
    """Record fields computed from the requests; those of unfinished requests are None.

    Raises ValueError if no request arrived within the window.
    """
    finished = [request for request in requests if request is not None]
    steady = [request for at, request in zip(arrivals_s, requests, strict=True) if at in window]
    if not steady:
        raise ValueError(f"a request must arrive from {window.start_s:g} to {window.end_s:g} s, but none does")
    done = [request for request in steady if request is not None]
    return {
        "num_requests": len(requests),
        "num_finished": len(finished),
        "num_steady": len(steady),
        "num_tokens": sum(request.num_tokens for request in finished),
        "offered_rate": len(steady) / window.length_s,
        "goodput": sum(limits.hold(request) for request in finished if request.end_s in window) / window.length_s,
        "within_limits_rate": sum(map(limits.hold, done)) / len(steady),
        **_rates(finished, window),
        **_user_throughput(done),
        **_spread("ttft", [request.ttft_s for request in done], len(steady)),
        **_spread("inter_token", _known([request.inter_token_s for request in done]), _num_longer(steady)),
        **_spread("latency", [request.latency_s for request in done], len(steady)),
        **_spread("queue", _known([request.queue_s for request in done]), len(steady)),
    }


def saturation(
    arrivals_s: Sequence[float],
    requests: Sequence[Request | None],
    refused: frozenset[int],
    window: Window,
    end_s: float,
    *,
    is_open: bool = True,
) -> dict[str, Any]:
    """Record fields: whether the server falls behind the arrivals of the window.

    It does if latency grows (see `bench.records.batch_means.Growth`), or if it refuses more than MAX_REFUSED of the
    requests. arrivals_s: in order. end_s: of the run; a request that is not finished then has waited until then.
    is_open: whether the loop is open; clients that wait for answers never overload a server, and the fields are None.
    """
    if not is_open:
        return dict.fromkeys(("latency_growth", "latency_growth_low", "is_saturated"))
    steady = [index for index, at in enumerate(arrivals_s) if at in window]
    accepted = [index for index in steady if index not in refused]
    latencies_s = [request.latency_s if (request := requests[i]) else end_s - arrivals_s[i] for i in accepted]
    growth = latency_growth([arrivals_s[index] for index in accepted], latencies_s)
    is_refusing = len(steady) - len(accepted) > MAX_REFUSED * len(steady)
    return {
        "latency_growth": growth and growth.slope,
        "latency_growth_low": growth and growth.low,
        "is_saturated": True if is_refusing else growth and growth.is_saturated,
    }


def in_flight(spans: Sequence[tuple[float, float]], window: Window) -> tuple[float, int]:
    """(mean, maximum) number of overlapping spans within a window.

    A span that ends when another starts does not overlap it.
    """
    inside = [
        (max(start, window.start_s), min(end, window.end_s)) for start, end in spans if window.overlap_s(start, end)
    ]
    changes = sorted([(start, 1) for start, _ in inside] + [(end, -1) for _, end in inside])
    number = largest = 0
    for _, change in changes:
        number += change
        largest = max(largest, number)
    return sum(end - start for start, end in inside) / window.length_s, largest


def _rates(finished: Sequence[Request], window: Window) -> dict[str, Any]:
    """Requests finished and tokens emitted per second of the window, with intervals from its parts."""
    parts = window.parts()
    completions = [_completion_rate(finished, part) for part in parts]
    tokens = [_token_rate(finished, part) for part in parts]
    return {
        **_interval("achieved_rate", batch_means_interval(_completion_rate(finished, window), completions)),
        "achieved_rate_by_part": completions,
        **_interval("throughput_tok_s", batch_means_interval(_token_rate(finished, window), tokens)),
    }


def _completion_rate(finished: Sequence[Request], window: Window) -> float:
    return sum(request.end_s in window for request in finished) / window.length_s


def _token_rate(finished: Sequence[Request], window: Window) -> float:
    return math.fsum(request.tokens_within(window.start_s, window.end_s) for request in finished) / window.length_s


def _user_throughput(done: Sequence[Request]) -> dict[str, Any]:
    """Tokens per second that a request gets after its first, with its interval from consecutive groups of requests."""
    times_s = _known([request.inter_token_s for request in done])
    if not times_s or not all(times_s):
        return dict.fromkeys(("user_throughput_tok_s", "user_throughput_tok_s_low", "user_throughput_tok_s_high"))
    parts = [1 / fmean(group) for group in groups(times_s)]
    return _interval("user_throughput_tok_s", batch_means_interval(1 / fmean(times_s), parts))


def _interval(name: str, found: Interval) -> dict[str, float | None]:
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


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
