"""Checks the state that an engine rolls back after a rejection, by forced acceptance patterns.

Usual acceptance rates visit few states: a good draft is hardly ever rejected, a bad one never accepted, and both may
hide that a cache is rolled back wrongly. Each pattern of `specdec.forced` visits other states, and the logits of every
emitted token are compared with those of the target reading the same tokens afresh. A fault of the state moves logits
long before it changes a token or a rate.

It does not replace an audit: it tests no verification rule, and nothing that depends on the draft's distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from specdec.conformance.reference import Reference
from specdec.engine import Engine
from specdec.models.base import LanguageModel
from specdec.requests import Completion
from specdec.sampling_params import SamplingParams

Pattern = str | tuple[int, ...]

PATTERNS: tuple[Pattern, ...] = ("none", "all", "alternating", (1,), (0, 1, 2, 3))


@dataclass(frozen=True, slots=True)
class StateGap:
    """How far the logits of an engine's loop are from those of the target reading the same tokens afresh.

    pattern: the forced acceptance pattern. num_tokens: tokens compared. num_accepted: of these, accepted draft tokens.
    largest: the largest difference of a token's log-probability, in nats. prompt, place: where, as the number of the
    prompt and the position in its output.
    """

    pattern: Pattern
    num_tokens: int
    num_accepted: int
    largest: float
    prompt: int
    place: int


def state_gaps(
    make_engine: Callable[[Pattern], Engine],
    reference: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    patterns: Sequence[Pattern] = PATTERNS,
) -> list[StateGap]:
    """The gap under each pattern. A sound engine's is rounding: about 1e-5 nats in float32.

    Args:
        make_engine: makes the engine for a pattern, which it passes on as `forced_acceptance`.
        reference: the target in float32 or wider. It is not decoded with, so that a fault of the engine's copy is not
            in both.
        prompts: token ids, none empty.
        sampling: for all prompts; prompt i is decoded with seed + i.
        patterns: names in `specdec.forced.NAMED_PATTERNS`, or numbers of accepted draft tokens, step by step.
    """
    params = [replace(sampling, logprobs=True, seed=sampling.seed + index) for index in range(len(prompts))]
    gaps = []
    for pattern in patterns:
        completions = make_engine(pattern).generate([list(prompt) for prompt in prompts], params)
        gaps.append(_gap(pattern, reference, completions))
    return gaps


def _gap(pattern: Pattern, reference: LanguageModel, completions: Sequence[Completion]) -> StateGap:
    prompts = [completion.prompt_token_ids for completion in completions]
    outputs = [completion.token_ids for completion in completions]
    afresh = Reference(reference, SamplingParams())  # a new one: its caches hold nothing to roll back
    worst = StateGap(pattern, sum(map(len, outputs)), sum(each.counts.num_accepted for each in completions), 0.0, 0, 0)
    for positions in afresh.distributions(prompts, outputs):
        exact = positions.logits.double().log_softmax(-1).gather(1, positions.tokens.unsqueeze(1)).squeeze(1)
        cells = list(zip(positions.requests.tolist(), positions.places.tolist(), strict=True))
        in_loop = torch.tensor([(completions[request].logprobs or ())[place] for request, place in cells])
        gaps = (in_loop.to(exact) - exact).abs().nan_to_num(nan=torch.inf)
        index = int(gaps.argmax())
        if gaps[index] > worst.largest:
            worst = replace(worst, largest=float(gaps[index]), prompt=cells[index][0], place=cells[index][1])
    return worst
