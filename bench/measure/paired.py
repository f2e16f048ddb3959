"""Paired measurement: a cell's candidate with its baseline and the reference engine, prompt by prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.engines.base import Run

CANDIDATE, BASELINE, REFERENCE = "candidate", "baseline", "reference"
ARMS = (BASELINE, CANDIDATE, REFERENCE)

Arm = Callable[[int], Run]  # decodes round i's prompts


class Clock:
    """pytest-benchmark's timer: the real one, or, during a replay, one that shows recorded durations."""

    __name__ = "bench.measure.paired.Clock"

    def __init__(self) -> None:
        self._replayed_s: float | None = None

    def __call__(self) -> float:
        return time.perf_counter() if self._replayed_s is None else self._replayed_s

    def replay(self, benchmark: Any, rounds_s: Sequence[float]) -> None:
        """Report rounds that were measured earlier to pytest-benchmark."""
        durations = iter(rounds_s)

        def start() -> None:
            self._replayed_s = 0.0

        def advance() -> None:
            self._replayed_s = next(durations)

        try:
            benchmark.pedantic(advance, setup=start, rounds=len(rounds_s))
        finally:
            self._replayed_s = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Each arm's runs, round by round, and the wall time of the candidate's rounds.

    spans: start and end of each of the candidate's rounds, by time.perf_counter.
    """

    runs: Mapping[str, list[Run]]
    rounds_s: list[float]
    spans: Sequence[tuple[float, float]] = ()


def measure(
    benchmark: Any, arms: Mapping[str, Arm], num_rounds: int, settle: Callable[[], None] = lambda: None
) -> Measurement:
    """Run all arms on every round's prompts; pytest-benchmark times the candidate.

    arms: CANDIDATE and, where there is something to compare with, BASELINE and REFERENCE. Their order is reversed in
    every other round, so that neither drift of the machine nor the order favors one of them.
    settle: called after each arm, outside of what is timed; returns when no arm keeps the machine busy.
    """
    rounds = _Rounds(arms, settle)
    benchmark.pedantic(rounds.candidate, setup=rounds.before, teardown=rounds.after, rounds=num_rounds)
    return Measurement(rounds.runs, list(benchmark.stats.stats.data), rounds.spans)


class _Rounds:
    """The callbacks of pytest-benchmark before, in and after the timed part of each round."""

    def __init__(self, arms: Mapping[str, Arm], settle: Callable[[], None]) -> None:
        self._arms, self._settle = arms, settle
        self._order = [arm for arm in ARMS if arm in arms]
        self._round = -1
        self.runs: dict[str, list[Run]] = {arm: [] for arm in self._order}
        self.spans: list[tuple[float, float]] = []

    def before(self) -> None:
        self._round += 1
        self._order.reverse()
        for arm in self._order[: self._order.index(CANDIDATE)]:
            self._run(arm)
            self._settle()

    def candidate(self) -> None:
        start_s = time.perf_counter()
        self._run(CANDIDATE)
        self.spans.append((start_s, time.perf_counter()))

    def after(self) -> None:
        self._settle()
        for arm in self._order[self._order.index(CANDIDATE) + 1 :]:
            self._run(arm)
            self._settle()

    def _run(self, arm: str) -> None:
        self.runs[arm].append(self._arms[arm](self._round))


def check_counts(runs: Sequence[Run], method: str, max_tokens: int) -> None:
    """Assert that the counters agree with the tokens. Times are never asserted."""
    for result in (result for run in runs for result in run.results):
        num_tokens, counts = len(result.token_ids), result.counts
        assert 1 <= num_tokens <= max_tokens
        assert (num_tokens == max_tokens) or result.finish_reason == "stop"
        assert result.latency_s >= result.ttft_s > 0
        if counts is not None:
            # the prefill's token belongs to no step, unless the prefill verified a draft and so was one
            assert num_tokens - counts.num_emitted in (0, 1)
            assert sum(counts.accepted_at) == counts.num_accepted <= counts.num_drafted
            assert method != "autoregressive" or counts.num_drafted == 0
