"""Adaptive draft length: drafts as many tokens as are worth verifying, by measured costs and the draft's confidence.

One more token costs a draft step and a wider target step, and is emitted if it and all earlier draft tokens are
accepted. It is worth drafting while that probability per second of cost exceeds the run's tokens per second (the
renewal-reward rule). The decision depends on costs, on past steps and on the draft's confidence in its tokens so far,
never on uniforms of verification: whether a position is drafted is decided before its token is drawn, so the output
distribution is still the target's.

Copying is free but verification is not: the number of tokens to copy depends only on the acceptance of earlier copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from operator import mul

from torch import Tensor

from specdec.kernels import cpp, gpu
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts

_MEMORY = 0.98  # weight of the past, per step
_PRIOR = (3.0, 5.0)  # prior counts: tokens accepted, tokens tested
_COPIED_PRIOR = (4.0, 5.0)  # for each position of a copy, where a correct token usually follows a correct one


class AdaptiveLength:
    """Decides during drafting whether another token is worth its cost, from costs and past steps.

    The rows of a batch share a step as wide as its longest draft. So the cost of one more token is compared with the
    expected gain of all rows, and either all rows that are still drafting draft it or none.

    costs: step costs by number of rows, interpolated in between; or the same costs for any number.
    """

    def __init__(self, costs: StepCosts | Mapping[int, StepCosts]) -> None:
        self._measured = costs if isinstance(costs, Mapping) else {1: costs}
        self._costs: dict[int, StepCosts] = {}  # cached by number of rows
        self._tokens, self._seconds = 1.0, 1.0  # tokens per row and step; step time / time of a step without draft
        self._accepted, self._tested = _PRIOR
        self._copied = [_COPIED_PRIOR] * MAX_DRAFT_LENGTH  # (accepted, tested) by position

    def costs(self, num_rows: int) -> StepCosts:
        """The costs of a step with num_rows rows."""
        if num_rows not in self._costs:
            self._costs[num_rows] = _between(self._measured, num_rows)
        return self._costs[num_rows]

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        """Whether to draw one more token, for each row.

        reach: the probability that all tokens drafted so far are accepted, for each row that is decoded; 0 where the
        draft has ended.
        """
        costs = self.costs(len(reach))
        cost_s = costs.step_s(num_drafted + 1) - costs.step_s(num_drafted)
        more = sum(reach) * self._accepted / self._tested > cost_s * self._tokens_per_s(len(reach))
        return [more and probability > 0 for probability in reach]

    def num_copied(self, lengths: Sequence[int], num_rows: int) -> int:
        """The number of tokens to copy with the largest gain over its cost, possibly 0.

        lengths: available tokens of each row with a copy. num_rows: rows that share the step.
        """
        reach = list(accumulate((accepted / tested for accepted, tested in self._copied), mul))
        return self.best_length(together([reach[:length] for length in lengths]), num_rows)[0]

    def best_length(self, reach: Sequence[float], num_rows: int, *, drawn: bool = False) -> tuple[int, float]:
        """The draft length (possibly 0) with the largest gain, and that gain: expected tokens minus cost in tokens.

        reach: for each draft position, the expected number of drafts accepted up to it. num_rows: rows that share the
        step. drawn: whether drafting takes time, too.
        """
        tokens_per_s, costs = self._tokens_per_s(num_rows), self.costs(num_rows)
        cost_s = costs.step_s if drawn else costs.verified_s
        num_accepted = accumulate(reach, initial=0.0)
        gains = [tokens - tokens_per_s * (cost_s(length) - cost_s(0)) for length, tokens in enumerate(num_accepted)]
        best = max(gains)
        return gains.index(best), best

    def _tokens_per_s(self, num_rows: int) -> float:
        """Throughput of num_rows rows with recent draft lengths."""
        return num_rows * self._tokens / (self._seconds * self.costs(num_rows).step_s(0))

    def observe_copy(self, num_copied: int, num_accepted: int) -> None:
        """Update the statistics after a row's copy was verified."""
        num_tested = min(num_accepted + 1, num_copied)
        self._copied = [
            (
                _faded(accepted, _COPIED_PRIOR[0]) + (position < num_accepted),
                _faded(tested, _COPIED_PRIOR[1]) + (position < num_tested),
            )
            for position, (accepted, tested) in enumerate(self._copied)
        ]

    def observe(self, decided: Sequence[tuple[int, int]]) -> None:
        """Update the statistics after a step. decided: (drafted, accepted) tokens of each row."""
        accepted = sum(num_accepted for _, num_accepted in decided)
        tested = sum(min(num_accepted + 1, num_drafted) for num_drafted, num_accepted in decided)
        self._accepted = _faded(self._accepted, _PRIOR[0]) + accepted
        self._tested = _faded(self._tested, _PRIOR[1]) + tested
        costs, num_drafted = self.costs(len(decided)), max(num_drafted for num_drafted, _ in decided)
        self._tokens = _MEMORY * self._tokens + 1 + accepted / len(decided)
        self._seconds = _MEMORY * self._seconds + costs.step_s(num_drafted) / costs.step_s(0)


def together(reaches: Sequence[Sequence[float]]) -> list[float]:
    """For each position, the expected number of drafts accepted up to it.

    reaches: for each draft and token, the probability that the token and all before it are accepted.
    """
    return [sum(position) for position in zip_longest(*reaches, fillvalue=0.0)]


def _between(costs: Mapping[int, StepCosts], num_rows: int) -> StepCosts:
    """Costs interpolated linearly between measured numbers of rows, constant outside."""
    measured = sorted(costs)
    below = max((rows for rows in measured if rows <= num_rows), default=measured[0])
    above = min((rows for rows in measured if rows >= num_rows), default=measured[-1])
    share = (num_rows - below) / (above - below) if above > below else 0.0

    def mixed(a: float, b: float) -> float:
        return a + share * (b - a)

    few, many = costs[below], costs[above]
    target_s = tuple(map(mixed, few.target_s, many.target_s))
    return StepCosts(target_s, mixed(few.draft_s, many.draft_s), mixed(few.start_s, many.start_s))


def _faded(count: float, prior: float) -> float:
    """A count after one step of exponential decay toward its prior."""
    return _MEMORY * count + (1 - _MEMORY) * prior


def confidence(logits: Tensor) -> Tensor:
    """Largest probability under logits [rows, vocab], float32 [rows]."""
    if fast := gpu.for_gpu(logits):
        largest: Tensor = fast.confidence(logits)
        return largest
    if cpp.supports(logits):
        return cpp.confidence(logits)
    logits = logits.float()
    return (logits - logits.amax(-1, keepdim=True)).exp().sum(-1).reciprocal()
