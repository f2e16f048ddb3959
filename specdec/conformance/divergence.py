"""Why two greedy outputs differ: by rounding, at a near tie, or by a bug.

Half precision rounds otherwise when a step is wider, so logits move a little with the number of tokens scored
together. Where the target hardly prefers one token to another that little decides; where it does prefer one, it cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor

from specdec.models.base import LanguageModel, hold, prefill
from specdec.runtime.devices import upload

WIDTHS = (1, 2, 4, 8)  # tokens per step
_TAIL = 64  # tokens at the end that are scored in steps; those before them at once
SAFETY = 4.0  # times the noise seen: a few samples seldom show the largest


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where two outputs part.

    position: index of the first token that differs. tokens: the two tokens, None where an output has ended.
    margin: by how much the reference prefers its likeliest token to the second, in logits.
    gap: by how much it prefers it to the worse of the two tokens; inf where one output had ended.
    noise: spread of the difference of the two leading logits over step widths, in logits.
    """

    position: int
    tokens: tuple[int | None, int | None]
    margin: float
    gap: float
    noise: float
    verdict: Literal["rounding tie", "bug"]

    def __str__(self) -> str:
        ours, theirs = self.tokens
        return (
            f"{self.verdict}: at position {self.position} one output has token {ours} and the other {theirs}; the "
            f"reference's first two tokens are {self.margin:.3g} logits apart, the worse of these is {self.gap:.3g} "
            f"behind, and rounding moves logits by {self.noise:.3g}"
        )


def explain(
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    reference: LanguageModel,
    model: LanguageModel | None = None,
) -> Divergence | None:
    """Why greedy outputs of one prompt differ; None if they do not.

    reference: the target in float32. model: the target in the engine's own dtype, whose rounding is measured; the
    reference itself if None.
    """
    position = first_difference(ours, theirs)
    if position is None:
        return None
    context = [*prompt, *ours[:position]]
    logits = last_logits(reference, context, num_prompt=len(prompt))
    top = logits.topk(2)
    margin = float(top.values[0] - top.values[1])
    tokens = tuple(output[position] if position < len(output) else None for output in (ours, theirs))
    gaps = [float("inf") if token is None else float(top.values[0] - logits[token]) for token in tokens]
    noise = logit_noise(model or reference, context, margin, top.indices, num_prompt=len(prompt))
    return Divergence(
        position=position,
        tokens=(tokens[0], tokens[1]),
        margin=margin,
        gap=max(gaps),
        noise=noise,
        verdict="rounding tie" if max(gaps) <= SAFETY * noise else "bug",
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first position where two outputs differ, one being longer included; None if they are equal."""
    pairs = enumerate(zip_longest(ours, theirs))
    return next((index for index, (mine, other) in pairs if mine != other), None)


def margin(target: LanguageModel, prompt: Sequence[int], output: Sequence[int], position: int) -> float:
    """By how much the target's likeliest token leads the second at a position of an output, in log-probability.

    A small margin is a near tie, which rounding decides; a large one is a bug of one of the engines.
    """
    logits = last_logits(target, [*prompt, *output[:position]], num_prompt=len(prompt))
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def logit_noise(
    model: LanguageModel,
    context: Sequence[int],
    expected: float | None = None,
    tokens: Tensor | None = None,
    widths: Sequence[int] = WIDTHS,
    num_prompt: int | None = None,
) -> float:
    """Spread of the difference of two logits after a context, scored in steps of several widths, in logits.

    tokens: int64 [2], whose logits; the two leading ones if None. expected: the difference in float32, if it is known:
    the spread then includes the error of the model's dtype. num_prompt: tokens of the context that are the prompt; None
    for all.
    """
    if tokens is None:
        tokens = last_logits(model, context, num_prompt=num_prompt).topk(2).indices
    found = [last_logits(model, context, width, num_prompt)[tokens] for width in widths]
    differences = [float(pair[0] - pair[1]) for pair in found] + ([] if expected is None else [expected])
    return max(differences) - min(differences)


@torch.inference_mode()
def last_logits(
    model: LanguageModel, context: Sequence[int], width: int | None = None, num_prompt: int | None = None
) -> Tensor:
    """Logits after a context, float [vocab]; its end is scored in steps of `width` tokens, or all at once if None.

    num_prompt: tokens of the context that are the prompt, which an encoder reads as a whole; None for all.
    """
    cache = model.allocate(1, len(context))
    if width is None:
        return _wide(prefill(model, context, cache, slot=0, num_prompt=num_prompt).flatten())
    start = max(0, len(context) - _TAIL)
    if model.is_encoder_decoder:  # what is scored in steps is behind the prompt
        hold(model, context[:num_prompt], cache, slot=0)
        start = max(start, cache.num_cached[0])
    if start > cache.num_cached[0]:
        prefill(model, context[cache.num_cached[0] : start], cache, slot=0, num_prompt=num_prompt)
    # the short step comes first: it is the last one whose width is asked about
    for stop in range(start + ((len(context) - start) % width or width), len(context) + 1, width):
        logits = model.forward(upload([context[cache.num_cached[0] : stop]], model.device), cache, last_only=True)
        cache.num_cached[0] = stop
    return _wide(logits.flatten())


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
