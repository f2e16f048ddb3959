"""Record fields on acceptance: totals, intervals over prompts, each prompt's counts, and drift.

Counts of an engine that reports none are None, and so is all that follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

from bench.engines.base import PromptResult
from bench.measure.prompts import Encoded
from bench.records import trends
from bench.records.intervals import Interval, length_interval, rate_interval
from bench.records.schema import Record
from specdec import AcceptanceCounts

TOTALS = (
    "num_steps",
    "num_drafted",
    "num_accepted",
    "acceptance_rate",
    "acceptance_rate_at",
    "conditional_acceptance_rate_at",
    "acceptance_histogram",
    "mean_acceptance_length",
    "system_efficiency",
)
COUNTS = {"steps": "num_steps", "emitted": "num_emitted", "drafted": "num_drafted", "accepted": "num_accepted"}
MAX_BINS = 8  # of a text
NUM_PARTS = 10  # of the time of service
Results = Sequence[PromptResult | None]  # None for a request that did not finish
Place = tuple[int, int]  # (position in the text, tokens emitted) of a step


def total(results: Sequence[PromptResult]) -> AcceptanceCounts | None:
    """The summed counts; None unless every result has some."""
    counts = [result.counts for result in results if result.counts is not None]
    return AcceptanceCounts.total(counts) if len(counts) == len(results) else None


def of_results(results: Results, each: str, conversations: Sequence[int] | None = None) -> Record:
    """Totals with their intervals, and the counts of each prompt or request.

    each: "per_prompt" or "per_request". Intervals are over prompts, as the tokens of one prompt are not independent, or
    over conversations, if the number of each result's is given.
    """
    finished = [result for result in results if result is not None]
    summed = total(finished)
    known = _known(results, conversations) if summed else []
    counts, clusters = [each for each, _ in known], [cluster for _, cluster in known]
    rate = partial(_rate, counts, clusters)
    positions = range(len(summed.accepted_at)) if summed else range(0)
    at = [rate(_accepted_at(place), _accepted_at(-1)) for place in positions]
    conditional = [rate(_accepted_at(place), _accepted_at(place - 1)) for place in positions]
    lengths = length_interval([c.num_emitted for c in counts], [c.num_steps for c in counts], clusters)
    return {
        **{name: getattr(summed, name, None) for name in TOTALS},
        "acceptance_reason": None if summed else _reason(finished),
        **_ends("acceptance_rate", rate(lambda c: c.num_accepted, lambda c: c.num_drafted)),
        **_ends("mean_acceptance_length", lengths),
        **_ends_at("acceptance_rate_at", at if summed else None),
        **_ends_at("conditional_acceptance_rate_at", conditional if summed else None),
        **{
            f"{each}_{name}": [result and getattr(result.counts, attribute) for result in results] if summed else None
            for name, attribute in COUNTS.items()
        },
    }


def _reason(results: Sequence[PromptResult]) -> str:
    """Why not every result has counts."""
    reasons = [result.why_no_counts for result in results if result.counts is None and result.why_no_counts]
    return reasons[0] if reasons else "the engine does not report them"


def by_text(encoded: Sequence[Encoded], results: Results, each: str) -> Record:
    """What each result was an answer to, and the acceptance length over the position in the text, with its drift."""
    longest = max((len(result.counts.accepted_at) for result in results if result and result.counts), default=0)
    texts = [
        list(_whole_steps(len(tokens), result, longest)) if result else []
        for (_, tokens), result in zip(encoded, results, strict=True)
    ]
    steps = [[emitted for _, emitted in text] for text in texts]
    drift = trends.drift_within(steps, conversations(encoded)) if longest else None
    return {
        f"{each}_category": [prompt.category for prompt, _ in encoded],
        f"{each}_turn": [prompt.turn for prompt, _ in encoded],
        f"{each}_conversation": conversations(encoded),
        f"{each}_length": [len(tokens) for _, tokens in encoded],
        **_profile([step for text in texts for step in text] if longest else []),
        "text_drift": drift and drift.slope,
        "text_drift_p_value": drift and drift.p_value,
    }


def conversations(encoded: Sequence[Encoded]) -> list[int]:
    """The number of each prompt's conversation, from 0: its turns, or the same prompt again, are not independent."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(prompt.opening, len(numbers)) for prompt, _ in encoded]


def over_service(arrivals_s: Sequence[float], results: Results, duration_s: float) -> Record:
    """The acceptance length over the time of service, by the arrival of requests, with its drift."""
    known = [(at, result.counts) for at, result in zip(arrivals_s, results, strict=True) if result and result.counts]
    if not any(counts.num_drafted for _, counts in known):
        known = []
    drift = trends.drift_over_time(
        [at for at, _ in known], [counts.num_emitted for _, counts in known], [counts.num_steps for _, counts in known]
    )
    parts = [AcceptanceCounts() for _ in range(NUM_PARTS)]
    for at, counts in known:
        parts[min(int(at / duration_s * NUM_PARTS), NUM_PARTS - 1)].add(counts)
    return {
        "acceptance_length_over_service": [part.mean_acceptance_length for part in parts] if known else None,
        "service_drift": drift and drift.slope,
        "service_drift_p_value": drift and drift.p_value,
    }


def _whole_steps(num_prompt: int, result: PromptResult, longest: int) -> Iterator[Place]:
    """The steps that the end of the output can neither have cut nor kept from a full draft.

    These are the steps that end a whole step before the output does. The step that reaches beyond is left out, too: a
    step that crosses a given position is longer than others on average.
    """
    if result.step_tokens is None:
        return
    last = len(result.token_ids) - (longest + 1)
    ends = [*accumulate(result.step_tokens, initial=len(result.token_ids) - sum(result.step_tokens))]
    for start, end in pairwise(ends):
        if end <= last:
            yield num_prompt + start, end - start


def _profile(steps: Sequence[Place]) -> Record:
    """Mean tokens per step by position in the text, in bins of a power of two of tokens."""
    if not steps:
        return {"text_bin_tokens": None, "acceptance_length_over_text": None}
    width, furthest = 1, max(position for position, _ in steps)
    while furthest // width >= MAX_BINS:
        width *= 2
    bins = [AcceptanceCounts() for _ in range(furthest // width + 1)]
    for position, emitted in steps:
        bins[position // width].num_steps += 1
        bins[position // width].num_emitted += emitted
    lengths = [each.mean_acceptance_length for each in bins]
    return {"text_bin_tokens": width, "acceptance_length_over_text": lengths}


def _accepted_at(position: int) -> Callable[[AcceptanceCounts], int]:
    """The number of steps that accepted a position; -1 is the token before the draft, which all have."""

    def number(counts: AcceptanceCounts) -> int:
        if position < 0:
            return counts.num_steps
        return counts.accepted_at[position] if position < len(counts.accepted_at) else 0

    return number


def _known(results: Results, conversations: Sequence[int] | None) -> list[tuple[AcceptanceCounts, int]]:
    """The counts of each result that has some, and the number of its conversation or, if none are given, its own."""
    numbers = range(len(results)) if conversations is None else conversations
    return [(result.counts, it) for result, it in zip(results, numbers, strict=True) if result and result.counts]


def _rate(
    counts: Sequence[AcceptanceCounts],
    clusters: Sequence[int],
    part: Callable[[AcceptanceCounts], int],
    whole: Callable[[AcceptanceCounts], int],
) -> Interval | None:
    return rate_interval([part(each) for each in counts], [whole(each) for each in counts], clusters)


def _ends(name: str, interval: Interval | None) -> dict[str, Any]:
    return {f"{name}_low": interval and interval.low, f"{name}_high": interval and interval.high}


def _ends_at(name: str, intervals: Sequence[Interval | None] | None) -> dict[str, Any]:
    """Both ends by position."""
    if intervals is None:
        return {f"{name}_low": None, f"{name}_high": None}
    return {f"{name}_{end}": [each and getattr(each, end) for each in intervals] for end in ("low", "high")}
