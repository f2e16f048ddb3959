"""Acceptance counters, the rates derived from them, and the theory to compare them with.

Each decode step of a row drafts k tokens, accepts a of them and samples one more. Counts are exact integers: the same
seeds give the same counts on any machine. Accepted tokens removed by truncation (at a stop token or `max_tokens`) are
not counted as accepted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np


@dataclass(slots=True)
class AcceptanceCounts:
    """Acceptance counters summed over decode steps. The prefill and its token are not a step.

    For trees, D counts all nodes, position i is level i, and k is the number of levels.

    Attributes:
        num_steps: decode steps, S.
        num_drafted: draft tokens, D.
        num_accepted: accepted draft tokens, A.
        num_emitted: tokens emitted by decode steps, E_decode.
        num_slots: sum of k + 1, the number of tokens that perfect drafts would have emitted.
        accepted_at: for each draft position, the number of steps in which it was accepted.
    """

    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_emitted: int = 0
    num_slots: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def add_step(self, num_drafted: int, num_accepted: int, num_emitted: int, depth: int | None = None) -> None:
        """Count one step of one row, after truncation.

        Args:
            num_drafted: tokens drafted.
            num_accepted: draft tokens accepted and emitted.
            num_emitted: tokens emitted, num_accepted or one more.
            depth: for a tree, the number of levels; None for a chain.

        Raises:
            ValueError: if the numbers contradict each other.
        """
        depth = num_drafted if depth is None else depth
        if not 0 <= num_accepted <= depth <= num_drafted or not num_accepted <= num_emitted <= num_accepted + 1:
            raise ValueError(
                f"num_accepted={num_accepted} must lie in [0, num_drafted={num_drafted}] and, for a tree, in "
                f"[0, depth={depth}]; num_emitted={num_emitted} must be num_accepted or num_accepted + 1"
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
        """Add the counts of another run."""
        for name in ("num_steps", "num_drafted", "num_accepted", "num_emitted", "num_slots"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted_at += [0] * (len(other.accepted_at) - len(self.accepted_at))
        for position, count in enumerate(other.accepted_at):
            self.accepted_at[position] += count

    @classmethod
    def total(cls, counts: Iterable[AcceptanceCounts]) -> AcceptanceCounts:
        """The summed counts of several runs."""
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
        """Per draft position, the share of all steps in which it was accepted: unconditional, as in vLLM."""
        return [count / self.num_steps for count in self.accepted_at]

    @property
    def conditional_acceptance_rate_at(self) -> list[float | None]:
        """Per draft position, the share of the steps that accepted the previous position in which it was accepted too.

        A position that was not drafted counts as not accepted. None where no step accepted the previous position.
        """
        reached = [self.num_steps, *self.accepted_at]
        return [count / before if before else None for before, count in pairwise(reached)]

    @property
    def acceptance_histogram(self) -> list[int]:
        """Entry a: the number of steps that accepted exactly a draft tokens, as in vLLM's metrics of a request.

        A step accepts position i exactly if it accepts more than i tokens, so `accepted_at` has them all.
        """
        return [before - after for before, after in pairwise([self.num_steps, *self.accepted_at, 0])]

    @property
    def mean_acceptance_length(self) -> float | None:
        """E_decode / S: tokens per target call, including the recovered or bonus token; None without a step."""
        return self.num_emitted / self.num_steps if self.num_steps else None

    @property
    def system_efficiency(self) -> float | None:
        """E_decode / sum(k + 1): tokens emitted relative to perfect drafts; None without a step."""
        return self.num_emitted / self.num_slots if self.num_slots else None


@dataclass(slots=True)
class PhaseTimes:
    """Wall-clock seconds of a run by phase; the remainder is bookkeeping.

    For a step captured as one CUDA graph, phases are timed by the GPU's own clock; time it waits for the host counts
    as bookkeeping.

    Attributes:
        prefill_s: target forward passes over prompts.
        draft_s: proposing.
        scoring_s: target forward passes of decode steps.
        verification_s: logits to distributions, accept, recover and bonus.
        total_s: the whole run.
        recording_s: the part of all these spent on the first call of a shape, compilation and graph capture; 0 in a
            proper measurement.
    """

    prefill_s: float = 0.0
    draft_s: float = 0.0
    scoring_s: float = 0.0
    verification_s: float = 0.0
    total_s: float = 0.0
    recording_s: float = 0.0

    @property
    def bookkeeping_s(self) -> float:
        """Seconds outside all phases."""
        return self.total_s - self.prefill_s - self.draft_s - self.scoring_s - self.verification_s


def expected_length(acceptance_rate: float, gamma: int) -> float:
    """Expected tokens per target call if each draft token is accepted with probability a: (1 - a^(gamma+1)) / (1 - a).

    Source: Leviathan et al. 2023, equation 1.
    """
    _require_rate(acceptance_rate)
    if acceptance_rate == 1:
        return gamma + 1.0
    return (1 - acceptance_rate ** (gamma + 1)) / (1 - acceptance_rate)


def least_variance_rates(length: float, num_speculative_tokens: int) -> tuple[float, ...]:
    """Unconditional acceptance rates by draft position for an acceptance length: of all, those of least variance.

    length: tokens per target call, including the recovered or bonus token, in [1, num_speculative_tokens + 1].
    Every step accepts the whole part of length - 1 tokens, and one more with its fraction: two neighboring numbers, so
    no other distribution on whole numbers with this mean varies less.
    Raises ValueError for another length.
    Source: vLLM's `SpeculativeConfig._acceptance_length_to_rates` (vllm/config/speculative.py, pull request 40662).
    """
    if not 1 <= length <= num_speculative_tokens + 1:
        raise ValueError(
            f"length={length} must lie in [1, num_speculative_tokens + 1] = [1, {num_speculative_tokens + 1}]"
        )
    return tuple(min(max(length - 1 - position, 0.0), 1.0) for position in range(num_speculative_tokens))


def expected_speedup(acceptance_rate: float, gamma: int, cost_ratio: float) -> float:
    """Closed-form speed-up, expected_length / (gamma * cost_ratio + 1).

    cost_ratio: time of a draft step over time of a target step.
    Source: Leviathan et al. 2023, theorem 3.8.
    """
    return expected_length(acceptance_rate, gamma) / (gamma * cost_ratio + 1)


def predicted_speedup(
    acceptance_rate_at: Sequence[float], *, step_s: float, draft_s: float, scoring_s: float, verification_s: float
) -> float:
    """Speed-up implied by measured acceptance and measured times.

    Args:
        acceptance_rate_at: unconditional acceptance rate of each draft position; 1 + their sum is the tokens per step.
        step_s: seconds of an autoregressive step.
        draft_s, scoring_s, verification_s: seconds per speculative step.

    Raises:
        ValueError: if either step takes no time.
    """
    duration_s = draft_s + scoring_s + verification_s
    if not (step_s > 0 and duration_s > 0):
        raise ValueError(f"step_s={step_s} and draft_s + scoring_s + verification_s={duration_s} must be > 0")
    return (1 + math.fsum(acceptance_rate_at)) * step_s / duration_s


@dataclass(frozen=True, slots=True)
class RunTotals:
    """Counts and times of a run over all its requests. num_tokens: tokens emitted, including those of prefills."""

    counts: AcceptanceCounts
    times: PhaseTimes
    num_tokens: int

    @property
    def decode_s(self) -> float:
        """Seconds outside the prefill."""
        return self.times.total_s - self.times.prefill_s

    @property
    def step_s(self) -> float:
        """Seconds of scoring and verification per step and row."""
        return (self.times.scoring_s + self.times.verification_s) / self.counts.num_steps


@dataclass(frozen=True, slots=True)
class SpeedupParts:
    """A measured speed-up, split into the prediction and what the prediction leaves out.

    Each part is the change of the ratio of the two runs when one more effect is included in both, in this order.

    predicted: `predicted_speedup`, from the bare steps.
    truncation: accepted tokens after a stop token are not emitted.
    bookkeeping: time outside drafting, scoring and verification lengthens the steps of both runs.
    prefill: prompts are processed, and each yields a token.
    averaging: the rest: the measured speed-up is a geometric mean over rounds and latencies, which weights prompts
    differently from a ratio of total times.
    """

    predicted: float
    truncation: float
    bookkeeping: float
    prefill: float
    averaging: float


def attribute_speedup(measured: float, predicted: float, run: RunTotals, plain: RunTotals) -> SpeedupParts:
    """Split a measured speed-up into parts that add up to it. predicted: from the same two runs; plain: the
    autoregressive one.
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
    """Predicted speed-up for gamma = 0, 1, ..., len(acceptance_rate_at), assuming acceptance rates do not change.

    Args:
        acceptance_rate_at: unconditional acceptance rate of each draft position, measured at the largest gamma.
        drafted_share: tokens drafted per step over gamma, in (0, 1]; below 1 if the proposer sometimes has no guess.
        step_costs: measured pairs (tokens drafted per step, cost of the step in plain steps), at least one besides the
            plain step (0, 1). Costs are interpolated linearly and constant beyond the longest.

    Raises:
        ValueError: for a drafted_share outside (0, 1], and for costs or token counts that are not positive.
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
