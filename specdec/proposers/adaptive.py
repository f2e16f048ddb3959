"""How many tokens to draft: as many as are worth verifying, by measured costs and by how sure the draft is.

One more token costs a draft step and a wider target step, and is emitted if it and all drafted before it are accepted.
It pays while the probability of that, per second of its cost, is above the tokens per second that the run makes anyway
(the renewal-reward rule). The decision looks at costs, at past steps and at what the draft thinks of the tokens drafted
so far, never at a uniform that verification will use: given the tokens before a position, whether there is a draft for
it is settled before its token is drawn, so the output distribution stays the target's.

A copy costs nothing, but to verify it does: how many tokens are copied is settled before they are looked at, by how far
earlier copies came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, zip_longest
from operator import mul

from torch import Tensor

from specdec.kernels import cpp, gpu
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts

_MEMORY = 0.98  # weight of the past, per step
_PRIOR = (3.0, 5.0)  # tokens accepted of tokens looked at, before any was
_COPIED_PRIOR = (4.0, 5.0)  # the same for each position of a copy: where one token is right the next mostly is


class AdaptiveLength:
    """Decides, while a draft is drawn, whether another token pays; a function of the costs and of the past only.

    The rows of a batch share a step, which is as wide as its longest draft: what one more token of it costs is set
    against what all rows expect of one more, and all of them draft it or none.

    costs: of steps by how many rows they have, between which they are interpolated; or the same for any number.
    """

    def __init__(self, costs: StepCosts | Mapping[int, StepCosts]) -> None:
        self._measured = costs if isinstance(costs, Mapping) else {1: costs}
        self._costs: dict[int, StepCosts] = {}  # by rows that occurred
        self._tokens, self._seconds = 1.0, 1.0  # emitted in a row's step, and its time over that of one without a draft
        self._accepted, self._looked_at = _PRIOR
        self._copied = [
            _COPIED_PRIOR
        ] * MAX_DRAFT_LENGTH  # (accepted, looked at) by position, those before it being accepted

    def costs(self, num_rows: int) -> StepCosts:
        """Of a step of so many rows."""
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
        more = sum(reach) * self._accepted / self._looked_at > cost_s * self._tokens_per_s(len(reach))
        return [more and each > 0 for each in reach]

    def num_copied(self, lengths: Sequence[int], num_rows: int) -> int:
        """How many tokens to copy, possibly none: the number with the largest gain over its cost.

        lengths: how many could be copied, for each row that could. num_rows: rows that share the step.
        """
        reach = list(accumulate((accepted / looked_at for accepted, looked_at in self._copied), mul))
        return self.best_length(together([reach[:length] for length in lengths]), num_rows)[0]

    def best_length(self, reach: Sequence[float], num_rows: int, *, drawn: bool = False) -> tuple[int, float]:
        """How long drafts bring most above their cost, 0 included, and how many tokens more than none they then bring.

        reach: for each place in the rows' drafts, how many of these are expected to be accepted so far. num_rows: rows
        that share the step. drawn: whether tokens cost time besides their verification.
        """
        tokens_per_s, costs = self._tokens_per_s(num_rows), self.costs(num_rows)
        cost_s = costs.step_s if drawn else costs.verified_s
        brought = accumulate(reach, initial=0.0)
        gains = [tokens - tokens_per_s * (cost_s(number) - cost_s(0)) for number, tokens in enumerate(brought)]
        most = max(gains)
        return gains.index(most), most

    def _tokens_per_s(self, num_rows: int) -> float:
        """What so many rows make with drafts as they were."""
        return num_rows * self._tokens / (self._seconds * self.costs(num_rows).step_s(0))

    def observe_copy(self, num_copied: int, num_accepted: int) -> None:
        """Learn from a row that had something to copy: how many tokens it did, and how many of them were accepted."""
        num_looked_at = min(num_accepted + 1, num_copied)
        self._copied = [
            (
                _faded(accepted, _COPIED_PRIOR[0]) + (position < num_accepted),
                _faded(looked_at, _COPIED_PRIOR[1]) + (position < num_looked_at),
            )
            for position, (accepted, looked_at) in enumerate(self._copied)
        ]

    def observe(self, decided: Sequence[tuple[int, int]]) -> None:
        """Learn from a step: how many tokens each of its rows drafted, and how many of them were accepted."""
        accepted = sum(num_accepted for _, num_accepted in decided)
        looked_at = sum(min(num_accepted + 1, num_drafted) for num_drafted, num_accepted in decided)
        self._accepted = _faded(self._accepted, _PRIOR[0]) + accepted
        self._looked_at = _faded(self._looked_at, _PRIOR[1]) + looked_at
        costs, num_drafted = self.costs(len(decided)), max(num_drafted for num_drafted, _ in decided)
        self._tokens = _MEMORY * self._tokens + 1 + accepted / len(decided)
        self._seconds = _MEMORY * self._seconds + costs.step_s(num_drafted) / costs.step_s(0)


def together(reaches: Sequence[Sequence[float]]) -> list[float]:
    """How many of several drafts are expected to be accepted so far, for each place.

    reaches: of each draft, for each of its tokens the probability that it and those before it are accepted.
    """
    return [sum(each) for each in zip_longest(*reaches, fillvalue=0.0)]


def _between(costs: Mapping[int, StepCosts], num_rows: int) -> StepCosts:
    """Costs interpolated between the numbers of rows that they are known for; outside of these the nearest ones."""
    known = sorted(costs)
    less = max((rows for rows in known if rows <= num_rows), default=known[0])
    more = min((rows for rows in known if rows >= num_rows), default=known[-1])
    share = (num_rows - less) / (more - less) if more > less else 0.0

    def mixed(a: float, b: float) -> float:
        return a + share * (b - a)

    few, many = costs[less], costs[more]
    target_s = tuple(map(mixed, few.target_s, many.target_s))
    return StepCosts(target_s, mixed(few.draft_s, many.draft_s), mixed(few.start_s, many.start_s))


def _faded(count: float, prior: float) -> float:
    """A count of the past, a step later."""
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
