"""Acceptance counters by specdec's definitions, from what other engines count.

Most engines count accepted tokens before an output is truncated at a stop token or `max_tokens`; specdec counts only
those that were emitted. A step emits its accepted tokens and one more. So if an engine's counters imply more tokens
than were emitted, the surplus was truncated from the last step: its final token, and before that accepted tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from specdec import AcceptanceCounts
from specdec.servers.errors import EngineError


def plain(num_tokens: int) -> AcceptanceCounts:
    """Counters of plain decoding: every token after the prefill's is a step."""
    return AcceptanceCounts(num_steps=num_tokens - 1, num_emitted=num_tokens - 1, num_slots=num_tokens - 1)


def acceptance(emitted: Sequence[int], drafts: Mapping[str, Any] | None, depth: int | None = None) -> AcceptanceCounts:
    """Counters from the tokens of each step and vLLM's or SGLang's counters of a prompt.

    emitted: number of tokens per step, the prefill's first. drafts: `num_drafted`, and `accepted_at` by position or the
    `histogram` of steps by their accepted tokens; None without drafting. depth: levels of the draft, if it is a tree.
    Raises EngineError if the counters contradict the emitted tokens.
    """
    accepted_at, num_drafted = _accepted_at(drafts) if drafts else [], drafts["num_drafted"] if drafts else 0
    num_steps, num_emitted = len(emitted) - 1, sum(emitted[1:])
    num_cut = sum(accepted_at) + num_steps - num_emitted
    if num_cut < 0:
        raise EngineError(
            f"accepted_at={accepted_at} must account for emitted={list(emitted)}; does the engine count steps "
            "differently?"
        )
    if emitted[-1] + num_cut - 1 > len(accepted_at):
        raise EngineError(
            f"accepted_at={accepted_at[:80]} must match the emitted tokens; does the engine count steps differently?"
        )
    for position in range(emitted[-1], emitted[-1] + num_cut - 1):
        accepted_at[position] -= 1
    return _counts(num_steps, num_drafted, num_emitted, accepted_at, depth)


def from_steps(emitted: Sequence[int], num_drafted: int, num_accepted: int) -> AcceptanceCounts:
    """Counters from the tokens of each step and an engine's totals.

    emitted: number of tokens per step, the prefill's first. Raises EngineError if the totals contradict them.
    """
    accepted = [number - 1 for number in emitted[1:]]
    num_cut = num_accepted - sum(accepted)
    if num_cut < 0 or num_accepted > num_drafted or (num_cut and not accepted):
        raise EngineError(
            f"num_accepted={num_accepted} of num_drafted={num_drafted} must account for emitted={list(emitted)[:80]}; "
            "does the engine count differently?"
        )
    if num_cut:  # the last step was truncated, so that its last token is an accepted one
        accepted[-1] += 1
    num_positions = max([*accepted, math.ceil(num_drafted / len(accepted))]) if accepted else 0
    accepted_at = [sum(number > position for number in accepted) for position in range(num_positions)]
    return _counts(len(accepted), num_drafted, sum(emitted[1:]), accepted_at)


def of_steps(num_tokens: int, num_steps: int, drafts: Mapping[str, Any], depth: int | None = None) -> AcceptanceCounts:
    """Counters of an output without truncated accepted tokens; tokens of several steps may have arrived together.

    num_tokens: emitted, with the prefill's. drafts, depth: as for `acceptance`.
    Raises EngineError if the counters contradict the tokens, or if accepted tokens were truncated.
    """
    accepted_at = _accepted_at(drafts)
    num_cut = sum(accepted_at) + num_steps - (num_tokens - 1)
    if num_cut not in (0, 1):  # 1 if an accepted token ended the output, so that the last step added no other
        raise EngineError(
            f"accepted_at={accepted_at[:80]} and num_steps={num_steps} must add up to the {num_tokens - 1} tokens "
            "after the first; accepted tokens were truncated, or the engine counts differently"
        )
    return _counts(num_steps, drafts["num_drafted"], num_tokens - 1, accepted_at, depth)


def _counts(
    num_steps: int, num_drafted: int, num_emitted: int, accepted_at: list[int], depth: int | None = None
) -> AcceptanceCounts:
    return AcceptanceCounts(
        num_steps=num_steps,
        num_drafted=num_drafted,
        num_accepted=sum(accepted_at),
        num_emitted=num_emitted,
        num_slots=(num_drafted if depth is None else depth * num_steps) + num_steps,
        accepted_at=accepted_at,
    )


def _accepted_at(drafts: Mapping[str, Any]) -> list[int]:
    """Number of steps in which each position was accepted, as reported or from the histogram of accepted tokens."""
    if "accepted_at" in drafts:
        return list(drafts["accepted_at"])
    histogram = drafts["histogram"]
    return [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]
