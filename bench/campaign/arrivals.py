"""When requests arrive under open-loop load, and the latency limits for the goodput."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Process = Literal["poisson", "constant"]
PROCESSES: tuple[Process, ...] = ("poisson", "constant")
MAX_REQUESTS = 100_000


@dataclass(frozen=True, slots=True)
class Request:
    """A finished request. Times are in seconds from its arrival.

    arrival_s: from the start of the run. num_tokens: emitted. queue_s: time until it had a slot, if it is reported.
    """

    arrival_s: float
    ttft_s: float
    latency_s: float
    num_tokens: int
    queue_s: float | None = None

    @property
    def inter_token_s(self) -> float | None:
        """Mean time between tokens; None for a single token."""
        return (self.latency_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Limits:
    """Maximum time to first token and mean inter-token time, in seconds, of a request that counts for the goodput."""

    ttft_s: float
    inter_token_s: float

    def hold(self, request: Request) -> bool:
        return request.ttft_s <= self.ttft_s and (request.inter_token_s or 0.0) <= self.inter_token_s


def replayed(times_s: Sequence[float], rate: float, duration_s: float) -> tuple[float, ...]:
    """Arrivals of a trace, its time stretched evenly so that requests arrive at a mean rate; those before `duration_s`.

    times_s: arrivals in the trace, in order. rate: requests per second over the whole trace, > 0; bursts stay bursts.
    Raises ValueError if the times are not in order.
    """
    if list(times_s) != sorted(times_s):
        raise ValueError("the requests of a trace must be in the order of their arrivals; sort its lines")
    span_s = times_s[-1] - times_s[0]
    stretch = (len(times_s) - 1) / rate / span_s if span_s else 0.0
    stretched = ((time_s - times_s[0]) * stretch for time_s in times_s)
    return tuple(time_s for time_s in stretched if time_s < duration_s)


def arrivals(rate: float, duration_s: float, process: Process, seed: int) -> tuple[float, ...]:
    """Arrival times in seconds from the start, in order, all before `duration_s`.

    rate: requests per second, > 0. "constant": every 1/rate seconds, the first at 0. "poisson": independent gaps from
    an exponential distribution of mean 1/rate. A seed gives the same gaps at every rate, scaled by that mean.
    Raises ValueError for a rate or a duration that is not positive, for no arrivals, and for more than MAX_REQUESTS.
    """
    for name, value in (("rate", rate), ("duration_s", duration_s)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value} must be > 0 and finite; give another --{name.removesuffix('_s')}")
    if rate * duration_s > MAX_REQUESTS:
        raise ValueError(
            f"rate={rate:g} for duration={duration_s:g} must be at most {MAX_REQUESTS} requests; lower one of them"
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
