"""The few sums over a vocabulary-sized distribution that the instruments need, computed in cache-sized blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Dot = Callable[[Tensor, Tensor], Tensor]

_BLOCK = 1 << 20  # probabilities
# the surprise instrument bets that the distribution was raised to the power 1 + exponent
EXPONENTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, -1 / 16, -1 / 8, -1 / 4, -1 / 2)


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """Sums over n tokens and their distributions; all float64 [n] except `tempered`, float64 [n, exponents].

    prob: the token's probability. above: total probability of more probable tokens, ties by lower id.
    before: total probability of lower ids. entropy, variance: of the surprise, in nats and nats squared.
    collision: sum of squared probabilities. tempered: ln sum_v p(v)^(1 + exponent).
    up, down: probability of the tokens to which the draft gives more, or less, than the target.
    sign: 1 if the token is in `up`, -1 if in `down`, else 0. All three are 0 without a draft.
    """

    prob: Array
    above: Array
    before: Array
    entropy: Array
    variance: Array
    collision: Array
    tempered: Array
    up: Array
    down: Array
    sign: Array

    @classmethod
    def of(cls, probs: Tensor, tokens: Tensor, draft_probs: Tensor | None = None) -> Facts:
        """probs, draft_probs: float [n, vocab]. tokens: int64 [n]."""
        size = max(1, _BLOCK // probs.shape[1])
        drafts = draft_probs.split(size) if draft_probs is not None else [None] * len(probs.split(size))
        room = probs.new_empty(3, size, probs.shape[1])  # allocating per product would dominate
        blocks = [_sums(*block, room) for block in zip(probs.split(size), tokens.split(size), drafts, strict=True)]
        return cls(*(torch.cat(parts).numpy() for parts in zip(*blocks, strict=True)))


def _sums(probs: Tensor, tokens: Tensor, draft_probs: Tensor | None, room: Tensor) -> list[Tensor]:
    places = tokens.unsqueeze(1)
    prob = probs.gather(1, places)
    smaller = torch.arange(probs.shape[1], device=probs.device) < places
    likelier = (probs > prob) | ((probs == prob) & smaller)
    product, logs, power = room[:, : len(probs)]

    def dot(rows: Tensor, others: Tensor) -> Tensor:  # torch sums pairwise; a matrix product would lose four digits
        return torch.mul(rows, others, out=product).sum(-1)

    torch.clamp(probs, min=torch.finfo(probs.dtype).tiny, out=logs).log_()
    surprise = -dot(probs, logs)
    variance = dot(product, logs) - surprise**2
    sums = [
        prob.squeeze(1),
        dot(probs, likelier),
        dot(probs, smaller),
        surprise,
        variance.clamp(min=0),
        dot(probs, probs),
        _tempered(probs, logs, power, dot).log(),
        *_directed(probs, draft_probs, places, dot),
    ]
    return [each.double().cpu() for each in sums]


def _tempered(probs: Tensor, logs: Tensor, power: Tensor, dot: Dot) -> Tensor:
    """sum_v p(v)^(1 + exponent) for each of EXPONENTS, [n, exponents]; logs and power are overwritten."""
    sums = []
    for sign in (1, -1):
        torch.mul(logs, sign / 16, out=power).exp_()
        for _ in range(4):
            sums.append(dot(probs, power))
            power.mul_(power)
    return torch.stack([*sums[:4], dot(probs, probs), *sums[4:]], 1)


def _directed(probs: Tensor, draft_probs: Tensor | None, places: Tensor, dot: Dot) -> list[Tensor]:
    if draft_probs is None:
        return [probs.new_zeros(len(probs))] * 3
    more, less = draft_probs > probs, draft_probs < probs
    sign = more.gather(1, places).double() - less.gather(1, places).double()
    return [dot(probs, more), dot(probs, less), sign.squeeze(1)]
