"""When the requests of a load arrive, and the latency limits for the goodput."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

Process = Literal["poisson", "constant"]
PROCESSES: tuple[Process, ...] = ("poisson", "constant")
MAX_REQUESTS = 100_000
MAX_CLOSED = 10_000  # requests of a closed loop: more do not make its statistics better
PREFERRED = (1.0, 1.5, 2.2, 3.3, 4.7, 6.8)  # rates of a sweep, times powers of ten: about 1.5 times each other
MIN_STEADY = 10  # requests that the lowest rate of a sweep brings into the window, on average
MAX_RATE = 1000.0  # of a sweep


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
    def end_s(self) -> float:
        """The time of its last token, from the start of the run."""
        return self.arrival_s + self.latency_s

    def tokens_within(self, start_s: float, end_s: float) -> float:
        """Tokens emitted from `start_s` to `end_s` of the run, if those after the first are equally far apart."""
        first_s = self.arrival_s + self.ttft_s
        found = float(start_s <= first_s < end_s)
        if first_s == self.end_s:
            return found * self.num_tokens
        overlap_s = max(0.0, min(self.end_s, end_s) - max(first_s, start_s))
        return found + (self.num_tokens - 1) * overlap_s / (self.end_s - first_s)

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


@dataclass(frozen=True, slots=True)
class Order:
    """The requests of a load by index: the number of the prompt of each, when it arrives, and which one it follows.

    arrivals_s, after: as `bench.engines.base.ServingEngine.serve` takes them.
    """

    prompts: tuple[int, ...]
    arrivals_s: tuple[float, ...]
    after: tuple[int | None, ...]


def open_loop(times_s: Sequence[float], conversations: Sequence[Sequence[int]], think_time_s: float) -> Order:
    """A conversation begins at each time, the same one again after all others; its turns follow each other's answers.

    conversations: numbers of the prompts that are their turns; a single prompt is a conversation of one turn.
    """
    rows: list[tuple[int, float, int | None]] = []
    for time_s, turns in zip(times_s, cycle(conversations), strict=False):
        rows.append((turns[0], time_s, None))
        rows += [(turn, think_time_s, len(rows) - 1 + place) for place, turn in enumerate(turns[1:])]
    return _order(rows)


def closed_loop(num_clients: int, conversations: Sequence[Sequence[int]], think_time_s: float) -> Order:
    """Clients that start together, each with one conversation after another: every request follows an answer.

    The client with number c has conversations c, c + num_clients, ... There are about MAX_CLOSED requests.
    """
    per_client = max(1, MAX_CLOSED // num_clients)
    rows: list[tuple[int, float, int | None]] = []
    for client in range(num_clients):
        first, number = len(rows), client
        while len(rows) - first < per_client:
            for turn in conversations[number % len(conversations)]:
                is_first = len(rows) == first
                rows.append((turn, 0.0, None) if is_first else (turn, think_time_s, len(rows) - 1))
            number += num_clients
    return _order(rows)


def _order(rows: Sequence[tuple[int, float, int | None]]) -> Order:
    return Order(*(tuple(column) for column in zip(*rows, strict=True))) if rows else Order((), (), ())


def sweep_rates(window_s: float, duration_s: float) -> tuple[float, ...]:
    """The rates of a sweep: preferred numbers from the lowest that fills a window of this length.

    Equal numbers in all runs, so that sweeps of different engines, methods and machines meet at the same rates.
    Raises ValueError if the window is too short for any of them.
    """
    rates = [factor * 10.0**power for power in range(-4, 4) for factor in PREFERRED]
    kept = [rate for rate in rates if MIN_STEADY / window_s <= rate <= min(MAX_RATE, MAX_REQUESTS / duration_s)]
    if not kept:
        raise ValueError(f"duration={duration_s:g} must allow a sweep up to {MAX_RATE:g} requests/s; change --duration")
    return tuple(float(f"{rate:.2g}") for rate in kept)


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
