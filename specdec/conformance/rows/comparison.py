"""Compare the logits of arrangements: bit-equal, different by rounding, or different by a bug.

Rounding is recognised by its size. The yardstick is the same model computed by transformers without a cache, once in
float64 and once in the tested dtype: their difference is what rounding does in that dtype. An arrangement may be as far
from float64 as that, times a safety factor; a state bug is much further away.

In 16 bits rounding is so coarse that it could hide a small bug. So the same code also runs in float32, where rounding
is 65,536 times finer than in bfloat16, and a bug is as large as before: it does not shrink with the precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdec.conformance.divergence import SAFETY
from specdec.conformance.rows.arrangements import PLAIN, WHOLE, Arrangement, Text
from specdec.conformance.rows.flips import Changes, FlipChance, flip_chance
from specdec.conformance.rows.scorers import Scorer
from specdec.runtime.checks import require

Verdict = Literal["bit-equal", "rounding", "bug"]
SAFETY_32 = 16.0  # in float32 and wider, where a bug is thousands of times the noise; kernels approximate exp and tanh


@dataclass(frozen=True, slots=True)
class FirstDifference:
    """The first logit that is not bit-equal: of text `text`, before continuation token `position`, of token `token`."""

    text: int
    position: int
    token: int
    plain: float
    other: float


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far the logits of an arrangement are from those of plain decoding and from float64.

    Attributes:
        num_positions, num_differing: positions compared with plain decoding, and those with a bit that differs.
        first: the first difference; None if there is none.
        max_gap: largest difference of a logit from plain decoding; inf if a logit is NaN.
        max_error: largest difference of a logit from float64.
        flips: the chance that greedy decoding emits another token than plain decoding.
    """

    num_positions: int
    num_differing: int
    first: FirstDifference | None
    max_gap: float
    max_error: float
    flips: FlipChance


@dataclass(frozen=True, slots=True)
class Yardstick:
    """Logits [n, vocab] of each text in float64, and what rounding does to them in a dtype.

    noise: largest difference of a logit from float64, of transformers in this dtype.
    """

    exact: Sequence[Tensor]
    dtype: torch.dtype
    noise: float

    @property
    def allowed(self) -> float:
        """The largest error that is rounding."""
        return self.noise * (SAFETY if self.dtype.itemsize == 2 else SAFETY_32)


def exact_logits(reference: Scorer, texts: Sequence[Text]) -> list[Tensor]:
    """The yardstick's logits of each text, in float64; reference: the float64 model."""
    return [reference.score([text], WHOLE).double() for text in texts]


def measure_noise(ordinary: Scorer, texts: Sequence[Text], exact: Sequence[Tensor], dtype: torch.dtype) -> Yardstick:
    """Measure rounding in a dtype: with and without a cache, transformers' model in this dtype against float64."""
    tried = [arrangement for arrangement in (WHOLE, PLAIN) if ordinary.supports(arrangement)]
    errors = [
        largest(ordinary.score([text], arrangement), logits)
        for arrangement in tried
        for text, logits in zip(texts, exact, strict=True)
    ]
    least = torch.finfo(dtype).eps * max(float(logits[logits.isfinite()].abs().max()) for logits in exact)
    return Yardstick(exact, dtype, max(least, *errors))


def largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference of two tensors of logits; equal infinities differ by 0, and NaN by infinity."""
    difference = (one.double() - other.double()).abs()
    difference[one == other] = 0.0
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def deviations(
    scorer: Scorer, texts: Sequence[Text], tried: Sequence[Arrangement], exact: Sequence[Tensor]
) -> dict[Arrangement, Deviation]:
    """Compare arrangements with plain decoding; PLAIN is compared with itself, for its error.

    Raises ValueError for a scorer that does not support plain decoding.
    """
    require(
        scorer.supports(PLAIN),
        "the scorer must support plain decoding, with which all else is compared; test another one",
    )
    plain = [scorer.score([text], PLAIN) for text in texts]
    found = {PLAIN: _deviation(plain, plain, exact, PLAIN)}
    for arrangement in tried:
        if scorer.supports(arrangement):
            others = [scorer.score([*texts[index:], *texts[:index]], arrangement) for index in range(len(texts))]
            found[arrangement] = _deviation(plain, others, exact, arrangement)
    return found


def _deviation(
    plain: Sequence[Tensor], others: Sequence[Tensor], exact: Sequence[Tensor], arrangement: Arrangement
) -> Deviation:
    """plain, exact: logits [n, vocab] of each text; others: those of the arrangement's positions."""
    positions = [list(arrangement.positions(len(logits))) for logits in plain]
    of_plain = [logits[chosen] for logits, chosen in zip(plain, positions, strict=True)]
    of_exact = [logits[chosen] for logits, chosen in zip(exact, positions, strict=True)]
    differs = [_bits(one) != _bits(other) for one, other in zip(of_plain, others, strict=True)]
    return Deviation(
        num_positions=sum(map(len, positions)),
        num_differing=sum(int(each.any(-1).sum()) for each in differs),
        first=_first(differs, of_plain, others, positions),
        max_gap=max(map(largest, of_plain, others)),
        max_error=max(map(largest, others, of_exact)),
        flips=flip_chance([Changes.between(one, other) for one, other in zip(of_plain, others, strict=True)]),
    )


def _bits(logits: Tensor) -> Tensor:
    """The bits as integers: 0.0 and -0.0 differ, a NaN equals itself."""
    return logits.contiguous().view(_INTEGERS[logits.dtype.itemsize])


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _first(
    differs: Sequence[Tensor], plain: Sequence[Tensor], others: Sequence[Tensor], positions: Sequence[Sequence[int]]
) -> FirstDifference | None:
    for text, (each, one, other, chosen) in enumerate(zip(differs, plain, others, positions, strict=True)):
        for index, token in each.nonzero()[:1].tolist():
            return FirstDifference(text, chosen[index], token, float(one[index, token]), float(other[index, token]))
    return None


def judge(deviation: Deviation, yardstick: Yardstick, in_float32: tuple[Deviation, Yardstick] | None = None) -> Verdict:
    """Decide what the difference of an arrangement is. in_float32: the same code in float32; None if that was not run.

    Bit-equal logits that are far from float64 are a bug, too: then plain decoding has it as well.
    """
    if deviation.max_error > yardstick.allowed:
        return "bug"
    if in_float32 and in_float32[0].max_error > in_float32[1].allowed:
        return "bug"
    return "rounding" if deviation.num_differing else "bit-equal"
