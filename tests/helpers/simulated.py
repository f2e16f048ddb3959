"""A server of a known capacity in virtual time: the harness measures it as it measures others, in no time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any

from bench.engines.base import PromptResult, Served, Setup
from bench.engines.following import Following
from bench.engines.registry import EngineKind
from specdec import SamplingParams

SLOTS = 4
SERVICE_S = {"autoregressive": 0.8, "ngram": 0.4}  # mean time in a slot, of a request that is alone
SLOWDOWN = {"autoregressive": 0.0, "ngram": 0.5}  # of a request, for each other one in a slot when it begins
CAPACITY = {
    method: SLOTS / (SERVICE_S[method] * (1 + SLOWDOWN[method] * (SLOTS - 1))) for method in SERVICE_S
}  # requests per second: 5 and 4


class SimulatedEngine:
    """Requests take one of SLOTS slots in the order of their arrival, for a random time (a gamma distribution)."""

    version, tokenizer, dtype, stop_token_ids = "1", None, "float32", frozenset[int]()

    def prepare(self, setups: object) -> None:
        """Nothing to prepare."""

    def settle(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to stop."""

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        arrivals_s: Sequence[float],
        setup: Setup,
        sampling: Sequence[SamplingParams],
        limit_s: float,
        *,
        after: Sequence[int | None] | None = None,
        until_s: float = math.inf,
    ) -> Served:
        following = Following(arrivals_s, after, until_s)
        spans = simulate(following, setup.method)
        counted = following.arrivals_s()
        results = [
            _result(at, *spans[index], sampling[index].max_tokens)
            if at is not None and spans[index][1] <= limit_s
            else None
            for index, at in enumerate(counted)
        ]
        ends = [end for index, (_, end) in spans.items() if counted[index] is not None]
        return Served(tuple(results), min(limit_s, max(ends, default=0.0)), arrivals_s=counted)


def simulate(following: Following, method: str, seed: int = 0) -> dict[int, tuple[float, float]]:
    """When each request gets a slot and is finished, by index, until those that count are."""
    services = random.Random(seed)
    due = [(at, index) for index, at in following.due_s.items()]
    heapify(due)
    free_s, spans = [0.0] * SLOTS, dict[int, tuple[float, float]]()
    while due and not following.is_over:
        at, index = heappop(due)
        start_s = max(at, heappop(free_s))
        num_busy = sum(end > start_s for end in free_s)
        mean_s = SERVICE_S[method] * (1 + SLOWDOWN[method] * num_busy)
        end_s = start_s + services.gammavariate(4, mean_s / 4)
        heappush(free_s, end_s)
        spans[index] = start_s, end_s
        for follower in following.finish(index, end_s):
            heappush(due, (following.due_s[follower], follower))
    return spans


def _result(arrival_s: float, start_s: float, end_s: float, num_tokens: int) -> PromptResult:
    """The first token comes after a tenth of the time in the slot."""
    first_s = start_s + (end_s - start_s) / 10
    times = (first_s - arrival_s, end_s - arrival_s)
    return PromptResult(tuple(range(num_tokens)), *times, None, "length", start_s - arrival_s)


def load(*_: Any) -> SimulatedEngine:
    return SimulatedEngine()


KIND = EngineKind(
    "specdec", ("autoregressive", "ngram"), load="helpers.simulated:load", extras=("arrivals",), max_batch_size=SLOTS
)
