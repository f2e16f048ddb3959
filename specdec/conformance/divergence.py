"""Explain why two greedy outputs differ: rounding at a near tie, or a bug.

In half precision, rounding depends on the width of a step, so logits change slightly with the number of tokens scored
together. That can flip a near tie, but not a clear preference.
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
_TAIL = 64  # tokens at the end scored in steps; those before are scored at once
SAFETY = 4.0  # factor on the measured noise: a few samples rarely include the largest


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first difference of two outputs.

    Attributes:
        position: index of the first differing token.
        tokens: the two tokens; None for an output that has ended.
        margin: the reference's logit difference between its top two tokens.
        gap: the reference's logit difference between its top token and the worse of `tokens`; inf if one has ended.
        noise: variation of the difference of the top two logits over step widths, in logits.
        verdict: "rounding tie" or "bug".
    """

    position: int
    tokens: tuple[int | None, int | None]
    margin: float
    gap: float
    noise: float
    verdict: Literal["rounding tie", "bug"]

    def __str__(self) -> str:
        first, second = self.tokens
        return (
            f"{self.verdict}: at position {self.position} one output has token {first} and the other {second}; the "
            f"reference's top two tokens are {self.margin:.3g} logits apart, the worse of the two outputs' tokens is "
            f"{self.gap:.3g} logits below the top, and rounding noise is {self.noise:.3g} logits"
        )


def explain(
    prompt: Sequence[int],
    first: Sequence[int],
    second: Sequence[int],
    reference: LanguageModel,
    model: LanguageModel | None = None,
) -> Divergence | None:
    """Explain why two greedy outputs of a prompt differ.

    Args:
        prompt: token ids.
        first, second: token ids of the two outputs.
        reference: the target in float32.
        model: the target in the engine's dtype, whose rounding noise is measured; None for the reference.

    Returns:
        The first difference, or None if the outputs are equal.
    """
    position = first_difference(first, second)
    if position is None:
        return None
    context = [*prompt, *first[:position]]
    logits = last_logits(reference, context, num_prompt=len(prompt))
    top = logits.topk(2)
    margin = float(top.values[0] - top.values[1])
    tokens = tuple(output[position] if position < len(output) else None for output in (first, second))
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


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first position where two outputs differ, including a difference in length; None if they are equal."""
    pairs = enumerate(zip_longest(first, second))
    return next((index for index, (token, other) in pairs if token != other), None)


def margin(target: LanguageModel, prompt: Sequence[int], output: Sequence[int], position: int) -> float:
    """Log-probability difference between the target's top two tokens at a position of an output.

    A small margin is a near tie that rounding can flip; a large one points to a bug.
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
    """Range of the difference of two logits after a context over several step widths, in logits.

    Args:
        model: the model.
        context: token ids.
        expected: the difference in float32, if known; the range then includes the error of the model's dtype.
        tokens: int64 [2], the two tokens; None for the top two.
        widths: tokens per step.
        num_prompt: number of prompt tokens in the context; None for all.
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
    """Logits after a context, float [vocab], with its end scored in steps of `width` tokens, or at once if None.

    num_prompt: number of prompt tokens in the context, which an encoder needs as a whole; None for all.
    """
    cache = model.allocate(1, len(context))
    if width is None:
        return _wide(prefill(model, context, cache, slot=0, num_prompt=num_prompt).flatten())
    start = max(0, len(context) - _TAIL)
    if model.is_encoder_decoder:  # only tokens after the prompt are scored in steps
        hold(model, context[:num_prompt], cache, slot=0)
        start = max(start, cache.num_cached[0])
    if start > cache.num_cached[0]:
        prefill(model, context[cache.num_cached[0] : start], cache, slot=0, num_prompt=num_prompt)
    # the short step comes first, so that the last one has the requested width
    for stop in range(start + ((len(context) - start) % width or width), len(context) + 1, width):
        logits = model.forward(upload([context[cache.num_cached[0] : stop]], model.device), cache, last_only=True)
        cache.num_cached[0] = stop
    return _wide(logits.flatten())


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
