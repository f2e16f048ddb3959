"""The chance that rounding changes a greedy token, from the margins of real text and the measured gaps.

A greedy token flips if an arrangement lowers the difference of the top two logits by more than their margin. Few of the
positions that one can afford to score have such a small margin, so each measured change is compared with each margin:
n positions then count as n * n. This assumes that the size of a change does not depend on the margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Changes:
    """What an arrangement does to the greedy decision at each position of a text.

    margins: float64 [n], plain decoding's logit difference of its top two tokens.
    changes: float64 [n], how much the arrangement increases the difference of the same two tokens.
    num_flips: number of positions with another greedy token.
    """

    margins: Array
    changes: Array
    num_flips: int

    @classmethod
    def between(cls, plain: Tensor, other: Tensor) -> Changes:
        """plain, other: logits [n, vocab] of the same positions."""
        tokens = plain.topk(2).indices
        pairs = [logits.gather(1, tokens).double().numpy() for logits in (plain, other)]
        margins, others = (pair[:, 0] - pair[:, 1] for pair in pairs)
        flips = plain.argmax(-1) != other.argmax(-1)
        return cls(margins, others - margins, int(flips.sum()))


@dataclass(frozen=True, slots=True)
class FlipChance:
    """The chance per token that greedy decoding emits another token, with its 95 % interval over texts.

    num_flips, num_positions: the flips that were seen.
    """

    rate: float
    low: float
    high: float
    num_flips: int
    num_positions: int


def flip_chance(texts: Sequence[Changes], seed: int = 0) -> FlipChance:
    """The chance of a flip at a position of texts like these, resampled by text for the interval."""
    pairs = np.array([[_num_flipping(one, other) for other in texts] for one in texts])
    sizes = np.array([len(text.margins) for text in texts])
    drawn = np.random.default_rng(seed).multinomial(len(texts), np.full(len(texts), 1 / len(texts)), NUM_RESAMPLES)
    rates = np.einsum("bt,tu,bu->b", drawn, pairs, drawn) / (drawn @ sizes) ** 2
    low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    num_flips = sum(text.num_flips for text in texts)
    return FlipChance(float(pairs.sum() / sizes.sum() ** 2), float(low), float(high), num_flips, int(sizes.sum()))


def _num_flipping(of_margins: Changes, of_changes: Changes) -> float:
    """Number of pairs of a margin and a change that reverse the order of two tokens; ties count as a half."""
    left = of_margins.margins[:, None] + of_changes.changes
    return float((left < 0).sum() + 0.5 * ((left == 0) & (of_changes.changes != 0)).sum())


QUANTILES = (0.01, 0.05, 0.25, 0.5)


def margin_quantiles(logits: Sequence[Tensor]) -> dict[float, float]:
    """Quantiles of the difference of the top two logits over all positions; logits: [n, vocab] of each text."""
    tops = torch.cat([each.double().topk(2).values for each in logits])
    margins = (tops[:, 0] - tops[:, 1]).numpy()
    return {quantile: float(np.quantile(margins, quantile)) for quantile in QUANTILES}
