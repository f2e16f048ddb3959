"""Open-loop load: when requests arrive, and what became of them, as numbers that every engine's are brought to.

Open loop: a request arrives at its time whether or not earlier ones are done, and waits where no slot is free. All
times of a request count from its arrival. Cells of one seed have the same arrivals, and at another rate the same ones
faster or slower, so that methods meet the same load.

A record (`bench.records.build_load`) has the identity of any cell, and

- rate: requests that arrive in a second, as asked for. It tells these records from others, which have none.
- arrivals, duration_s, drain_s, ttft_limit_s, inter_token_limit_s: the options by those names.
- num_requests, num_finished, num_unfinished, num_refused: that arrived; that were done in time; that were not, when
  duration and drain were over; that the server, or a client with too much in flight, did not take. The last three add
  up to the first.
- offered_rate: num_requests / duration_s. achieved_rate, throughput_tok_s, goodput: finished requests, their tokens,
  and those requests that kept both limits, per second of the time until the last token, at least duration_s.
- within_limits_rate: share of all requests that kept both limits.
- ttft_s, inter_token_s, latency_s, queue_s: means over finished requests. queue_s: from the arrival to the slot.
- ttft_p50_s, ttft_p95_s, ttft_p99_s, and so on: percentiles over all requests, of which those that were not finished
  count as slower than any other: None if a percentile is theirs. Leaving them out would flatter an engine that stalls.
- mean_num_in_flight, peak_num_in_flight: requests that have arrived and are not done. busy_rate: share of the time that
  was not spent waiting for an arrival; None if the engine does not tell.
- peak_send_delay_s: how late a client was at the most; None where nothing is sent.
- per_request_arrival_s, per_request_ttft_s, per_request_latency_s, per_request_tokens: of each, None if not finished.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

Process = Literal["poisson", "constant"]
PROCESSES: tuple[Process, ...] = ("poisson", "constant")
PERCENTILES = (50, 95, 99)
MOST_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class Request:
    """What became of a request. Times are in seconds from its arrival.

    arrival_s: from the beginning of the run. num_tokens: emitted. queue_s: until it had a slot, if the engine tells.
    """

    arrival_s: float
    ttft_s: float
    latency_s: float
    num_tokens: int
    queue_s: float | None = None

    @property
    def inter_token_s(self) -> float | None:
        """From a token to the next; None for a single one."""
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request must keep to count for the goodput, in seconds, the mean of its inter-token times taken."""

    ttft_s: float
    inter_token_s: float

    def hold(self, request: Request) -> bool:
        return request.ttft_s <= self.ttft_s and (request.inter_token_s or 0.0) <= self.inter_token_s


def arrivals(rate: float, duration_s: float, process: Process, seed: int) -> tuple[float, ...]:
    """When requests arrive, in seconds from the beginning, in order, all before `duration_s`.

    rate: requests a second, > 0. "constant": every 1/rate seconds, the first at once. "poisson": with independent gaps
    of an exponential law of mean 1/rate. A seed gives the same gaps at every rate, but for that mean.
    Raises ValueError for a rate or a duration that is not positive, for none at all, and for more than MOST_REQUESTS.
    """
    for name, value in (("rate", rate), ("duration_s", duration_s)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be > 0 and finite; give another --{name.removesuffix('_s')}")
    if rate * duration_s > MOST_REQUESTS:
        raise ValueError(
            f"rate={rate:g} for duration={duration_s:g} must be at most {MOST_REQUESTS} requests; lower one of them"
        )
    if process == "constant":
        return tuple(index / rate for index in range(math.ceil(rate * duration_s - 1e-9)))
    uniforms = random.Random(seed)
    times: list[float] = []
    now_s = -math.log(1 - uniforms.random()) / rate
    while now_s < duration_s:
        times.append(now_s)
        now_s += -math.log(1 - uniforms.random()) / rate
    if not times:
        raise ValueError(
            f"rate={rate:g} for duration={duration_s:g} must bring a request, but none arrives with seed={seed}; "
            "raise --duration"
        )
    return tuple(times)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest of the sorted values, as numpy has it; None if that is infinite.

    Raises ValueError if there are none.
    """
    if not values:
        raise ValueError("values=[] must not be empty: there were no requests")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    between = below if below == above else below + (above - below) * (place - math.floor(place))
    return between if math.isfinite(between) else None


def summary(requests: Sequence[Request | None], duration_s: float, limits: Limits) -> dict[str, Any]:
    """Fields of a record. requests: what became of each, None if it was not finished."""
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
        **_spread("inter_token", _told([request.inter_token_s for request in finished]), _num_longer(requests)),
        **_spread("latency", [request.latency_s for request in finished], len(requests)),
        **_spread("queue", _told([request.queue_s for request in finished]), len(requests)),
    }


def _told(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _num_longer(requests: Sequence[Request | None]) -> int:
    """Requests that have a time between tokens, or might have had."""
    return sum(request is None or request.num_tokens > 1 for request in requests)


def _spread(name: str, values: Sequence[float], num_requests: int) -> dict[str, float | None]:
    """The mean of what is known, and percentiles over all."""
    padded = [*values, *[math.inf] * (num_requests - len(values))]
    percentiles = {f"{name}_p{each}_s": percentile(padded, each) if values else None for each in PERCENTILES}
    return {f"{name}_s": fmean(values) if values else None, **percentiles}


def in_flight(spans: Sequence[tuple[float, float]]) -> tuple[float, int]:
    """How many of some spans of time lie over a moment: the mean from 0 to the last end, and the most.

    A span that ends where another begins does not overlap it.
    """
    end_s = max((end for _, end in spans), default=0.0)
    if not end_s:
        return 0.0, 0
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    number = most = 0
    for _, change in changes:
        number += change
        most = max(most, number)
    return sum(end - start for start, end in spans) / end_s, most


def ratios(plain: Sequence[dict[str, Any]], method: Sequence[dict[str, Any]]) -> dict[float, float | None]:
    """By rate: the median latency of plain decoding over that of a method; None where one has none. Above 1 it pays."""
    theirs = {record["rate"]: record.get("latency_p50_s") for record in plain}
    ours = {record["rate"]: record.get("latency_p50_s") for record in method}
    return {
        rate: theirs[rate] / ours[rate] if theirs[rate] and ours[rate] else None
        for rate in sorted(theirs.keys() & ours.keys())
    }


def pays(plain: Sequence[dict[str, Any]], method: Sequence[dict[str, Any]]) -> dict[float, bool | None]:
    """By rate: whether the median latency of a method is below that of plain decoding.

    A median that is not known, as half of the requests were not finished, is longer than any; None if neither is known.
    """
    theirs = {record["rate"]: record["latency_p50_s"] or math.inf for record in plain}
    ours = {record["rate"]: record["latency_p50_s"] or math.inf for record in method}
    return {
        rate: ours[rate] < theirs[rate] if min(ours[rate], theirs[rate]) < math.inf else None
        for rate in sorted(theirs.keys() & ours.keys())
    }


def stops_paying(paid: dict[float, bool | None]) -> tuple[float | None, float | None]:
    """The rates between which a method stops paying: the last at which it does, all before it too, and the next.

    None for the first if it pays at none, for the second if it does not stop; rates that tell nothing are passed over.
    """
    last = None
    for rate, is_paid in sorted(paid.items()):
        if is_paid is False:
            return last, rate
        last = rate if is_paid else last
    return last, None


def highest_rate(records: Sequence[dict[str, Any]], percent: int) -> float | None:
    """The highest rate at which so many percent of the requests kept the limits, as at all lower ones; None: none."""
    highest = None
    for record in sorted(records, key=lambda record: record["rate"]):
        if record["within_limits_rate"] < percent / 100:
            break
        highest = record["rate"]
    return highest
