"""Acceptance counters, the rates derived from them, and the theory they are compared with.

Per decode step and row, k tokens are drafted, a of them accepted and one more is drawn. Counts are exact integers:
the same seeds give the same counts on any machine. Tokens that truncation removes (a stop token inside an accepted
run, `max_tokens`) are not counted as accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np


@dataclass(slots=True)
class AcceptanceCounts:
    """Sums over decode steps; the prefill and the token it gives are not a step.

    num_steps: S. num_drafted: D. num_accepted: A. num_emitted: tokens emitted by decode steps, E_decode.
    accepted_at: steps in which draft position i was accepted. num_slots: sum of k + 1, what perfect drafts had emitted.
    Of a tree D counts all nodes, of which A are accepted; position i is its level i, and k the number of its levels.
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_emitted: int = 0
    num_slots: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add_step(self, num_drafted: int, num_accepted: int, num_emitted: int, depth: int | None = None) -> None:
        """Count one row's step, after truncation. Raises ValueError if the numbers contradict each other.

        depth: of a tree, how many tokens could have been accepted; None: num_drafted.
        """
        depth = num_drafted if depth is None else depth
        if not 0 <= num_accepted <= depth <= num_drafted or not num_accepted <= num_emitted <= num_accepted + 1:
            raise ValueError(
                f"num_accepted={num_accepted} must lie in [0, num_drafted={num_drafted}], of a tree in "
                f"[0, depth={depth}], and "
                f"num_emitted={num_emitted} be num_accepted or one more"
            )
        self.num_steps += 1
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        self.num_emitted += num_emitted
        self.num_slots += depth + 1
        self.accepted_at += [0] * (depth - len(self.accepted_at))
        for position in range(num_accepted):
            self.accepted_at[position] += 1

    def add(self, other: AcceptanceCounts) -> None:
        """Add another run's counts to these."""
        for name in ("num_steps", "num_drafted", "num_accepted", "num_emitted", "num_slots"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted_at += [0] * (len(other.accepted_at) - len(self.accepted_at))
        for position, count in enumerate(other.accepted_at):
            self.accepted_at[position] += count

    @classmethod
    def total(cls, counts: Iterable[AcceptanceCounts]) -> AcceptanceCounts:
        """The sum of several runs."""
        result = cls()
        for each in counts:
            result.add(each)
        return result

    @property
    def acceptance_rate(self) -> float | None:
        """A / D; None if nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def acceptance_rate_at(self) -> list[float]:
        """Steps in which draft position i was accepted / S: unconditional, like vLLM's per-position counter."""
        return [count / self.num_steps for count in self.accepted_at]

    @property
    def mean_acceptance_length(self) -> float | None:
        """E_decode / S: tokens out per target call, the recovered or bonus token included; None without a step."""
        return self.num_emitted / self.num_steps if self.num_steps else None

    @property
    def system_efficiency(self) -> float | None:
        """E_decode / sum(k + 1): emitted over what perfect drafts would have emitted; None without a step.

        A perfect tree has one token of each level accepted, so that k is its depth.
        """
        return self.num_emitted / self.num_slots if self.num_slots else None


@dataclass(slots=True)
class PhaseTimes:
    """Wall-clock seconds of a run by phase. What is left of the run is bookkeeping.

    prefill_s: target forwards over prompts. draft_s: proposing. scoring_s: target forwards of decode steps.
    verification_s: logits to distributions, accept, recover and bonus. recording_s: of all these, what went into first
    calls of a shape, compilation and recording, where steps are recorded; a measurement should have none.
    Of a step that is recorded as a whole the phases are by the GPU's own clock, read between them; what it waits for
    the host before a step is bookkeeping.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    scoring_s: float = 0.0
    verification_s: float = 0.0
    total_s: float = 0.0
    recording_s: float = 0.0

    @property
    def bookkeeping_s(self) -> float:
        """The run's time in none of the phases."""
        return self.total_s - self.prefill_s - self.draft_s - self.scoring_s - self.verification_s


def expected_length(acceptance_rate: float, gamma: int) -> float:
    """Expected tokens per target call, (1 - a^(gamma+1)) / (1 - a), if each draft token is accepted with probability a.

    Source: Leviathan et al. 2023, equation 1.
    """
    _require_rate(acceptance_rate)
    if acceptance_rate == 1:
        return gamma + 1.0
    return (1 - acceptance_rate ** (gamma + 1)) / (1 - acceptance_rate)


def expected_speedup(acceptance_rate: float, gamma: int, cost_ratio: float) -> float:
    """Closed form of the speed-up: expected_length / (gamma * c + 1), c being one draft step over one target step.

    Source: Leviathan et al. 2023, theorem 3.8.
    """
    return expected_length(acceptance_rate, gamma) / (gamma * cost_ratio + 1)


def predicted_speedup(
    acceptance_rate_at: Sequence[float], *, step_s: float, draft_s: float, scoring_s: float, verification_s: float
) -> float:
    """Speed-up that measured acceptance and measured times imply.

    acceptance_rate_at: unconditional acceptance of each draft position; their sum + 1 is the tokens per step.
    step_s: one autoregressive step; draft_s, scoring_s, verification_s: per speculative step, all in seconds.
    Raises ValueError unless the step takes time.
    """
    duration_s = draft_s + scoring_s + verification_s
    if not (step_s > 0 and duration_s > 0):
        raise ValueError(f"step_s={step_s} and draft_s + scoring_s + verification_s={duration_s} must be > 0")
    return (1 + math.fsum(acceptance_rate_at)) * step_s / duration_s


@dataclass(frozen=True, slots=True)
class RunTotals:
    """What a run did and how long it took, all its requests together.

    num_tokens: emitted, the token that each prefill gives included.
    """

    counts: AcceptanceCounts
    times: PhaseTimes
    num_tokens: int

    @property
    def decode_s(self) -> float:
        """Seconds of everything but the prefill."""
        return self.times.total_s - self.times.prefill_s

    @property
    def step_s(self) -> float:
        """Seconds of scoring and verification per step and row."""
        return (self.times.scoring_s + self.times.verification_s) / self.counts.num_steps


@dataclass(frozen=True, slots=True)
class SpeedupParts:
    """A measured speed-up as the sum of what was predicted and of what the prediction leaves out.

    Each part is what the ratio of two runs changes by when one more thing is counted in both of them, in this order.
    predicted: `predicted_speedup`, of steps without anything around them.
    truncation: accepted tokens behind a stop token are not emitted.
    bookkeeping: what a run does besides drafting, scoring and verifying; it makes steps of both runs longer.
    prefill: prompts are read, and each gives a token.
    averaging: what is left: the measured speed-up is a geometric mean over rounds and of latencies, which weights
    prompts otherwise than the ratio of total times does.
    """

    predicted: float
    truncation: float
    bookkeeping: float
    prefill: float
    averaging: float


def attribute_speedup(measured: float, predicted: float, run: RunTotals, plain: RunTotals) -> SpeedupParts:
    """The parts of a measured speed-up, which add up to it; predicted: from the same two runs, of which plain is
    autoregressive decoding.
    """
    emitted, plain_emitted = run.counts.num_emitted, plain.counts.num_emitted
    step_s = run.times.draft_s / run.counts.num_steps + run.step_s
    ratios = (
        predicted,
        (plain.step_s * plain.counts.num_steps / plain_emitted) / (step_s * run.counts.num_steps / emitted),
        (plain.decode_s / plain_emitted) / (run.decode_s / emitted),
        (plain.times.total_s / plain.num_tokens) / (run.times.total_s / run.num_tokens),
        measured,
    )
    return SpeedupParts(predicted, *(counted - before for before, counted in pairwise(ratios)))


def predicted_speedups(
    acceptance_rate_at: Sequence[float], drafted_share: float, step_costs: Sequence[tuple[float, float]]
) -> list[float]:
    """Predicted speed-up of gamma = 0, 1, ..., len(acceptance_rate_at), as if acceptance by position stayed the same.

    acceptance_rate_at: measured at the last of these. drafted_share: tokens drafted per step over gamma, in (0, 1];
    less than 1 where a proposer does not always have a guess.
    step_costs: measured (tokens drafted per step, cost of such a step in plain steps), at least one besides that of a
    plain step, (0, 1); between them costs lie on straight lines, beyond the longest they stay as they are.
    Raises ValueError unless drafted_share is in (0, 1] and costs are > 0 and of more than 0 tokens.
    """
    if not 0 < drafted_share <= 1:
        raise ValueError(f"drafted_share={drafted_share} must lie in (0, 1]")
    if not step_costs or min(min(point) for point in step_costs) <= 0:
        raise ValueError(f"step_costs={list(step_costs)} must be at least one pair of numbers > 0")
    drafted, costs = zip(*sorted([(0.0, 1.0), *step_costs]), strict=True)
    lengths = accumulate(acceptance_rate_at, initial=1.0)
    return [length / float(np.interp(drafted_share * gamma, drafted, costs)) for gamma, length in enumerate(lengths)]


def _require_rate(acceptance_rate: float) -> None:
    if not 0 <= acceptance_rate <= 1:
        raise ValueError(f"acceptance_rate={acceptance_rate} must lie in [0, 1]")
