"""Open-loop load: when requests arrive, and what became of them, as numbers that every engine's are brought to.

Open loop: a request arrives at its time whether or not earlier ones are done, and waits where no slot is free. All
times of a request count from its arrival. Cells of one seed have the same arrivals, and at another rate the same ones
faster or slower, so that methods meet the same load.

A record (`bench.measure.records.build_load`) has the identity of any cell, and

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
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from bench.campaign.arrivals import Limits, Request
from bench.records.schema import PERCENTILES


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
