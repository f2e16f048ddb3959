"""The instruments of an audit: statistics of emitted tokens whose distribution is known if the engine is lossless.

Each takes some tokens and returns bets, for `betting.Wealth`, and deviations of statistics from their exact means. A
statistic may depend on everything before its token (distribution, draft, prefix) but on nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.conformance.statistics.betting import DIRECTION_STAKES, both_signs
from specdec.conformance.statistics.contexts import RARITIES
from specdec.conformance.statistics.facts import EXPONENTS, Facts

Array = NDArray[np.float64]

# denser near 0 and 1, where a small change of probability is a large relative one
THRESHOLDS = np.array([1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 63 / 64])
_THRESHOLD_STAKES = both_signs(2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_SERIAL_STAKES = both_signs(1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
# High stakes on repetitions, which may be rare. Against them only low ones: where a repetition is all but certain,
# rounding of its probability in float32 would decide what a high stake pays.
_REPEAT_STAKES = np.array([8, 4, 2, 1, 1 / 2, 1 / 4, -1 / 4, -1 / 2, -1, -2])


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The input of the instruments: n tokens in the order in which they are tested, arrays float64 [n] if not stated.

    facts: sums over the distributions. rank, place: randomized probability integral transforms with tokens ordered by
    probability and by id; uniform and independent if the engine is lossless.
    place_before: `place` of the previous token, 1/2 for the first.
    guess_prob: probability of prompt lookup's guess, NaN without one. hit: whether the guess is the token.
    seen_prob, seen: float64 [n, rarities], see `contexts.seen_before`.
    """

    facts: Facts
    rank: Array
    place: Array
    place_before: Array
    guess_prob: Array
    hit: Array
    seen_prob: Array
    seen: Array


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """The output of an instrument on n tokens.

    log_factors: float64 [n, bets]. shifts: float64 [n, statistics], deviations from exact means; the first is reported.
    """

    log_factors: Array
    shifts: Array


@dataclass(frozen=True, slots=True)
class Instrument:
    """read: the function. num_bets, num_statistics: numbers of columns of its result.

    statistic: description of the reported statistic. span: its largest minus its smallest value.
    """

    read: Callable[[Draws], Reading]
    num_bets: int
    num_statistics: int
    statistic: str
    span: float


def read_rank(draws: Draws) -> Reading:
    """Is the token's rank by probability distributed as it should be?"""
    return _thresholds(draws.rank)


def read_place(draws: Draws) -> Reading:
    """The same in order of token ids, the order of cumulative sums, which reveals reused uniforms."""
    return _thresholds(draws.place)


def read_serial(draws: Draws) -> Reading:
    """Are neighbouring tokens sampled from independent uniforms? The mean of exp(stake * u) is known on [-1, 1]."""
    before, now = 2 * draws.place_before - 1, 2 * draws.place - 1
    stakes = before[:, None] * _SERIAL_STAKES
    return Reading(stakes * now[:, None] - _log_sinhc(stakes), (before * now)[:, None])


def read_surprise(draws: Draws) -> Reading:
    """Is the text as probable as it should be? Bets that the distribution was sharpened or flattened."""
    facts = draws.facts
    possible = facts.prob > 0  # a token of probability 0 is reported separately, and does not end the martingale
    logs = np.log(np.where(possible, facts.prob, 1.0))
    factors = np.where(possible[:, None], logs[:, None] * EXPONENTS - facts.tempered, 0.0)
    return Reading(factors, (facts.prob - facts.collision)[:, None])


def read_draft(draws: Draws) -> Reading:
    """Is the text biased toward tokens that the draft prefers more than the target does?"""
    return _direction(draws.facts.sign, draws.facts.up, draws.facts.down)


def read_lookup(draws: Draws) -> Reading:
    """Is the text biased toward what prompt lookup would copy? This draft is always available."""
    known = np.isfinite(draws.guess_prob)
    up = np.where(known, draws.guess_prob, 0.0)
    return _direction(np.where(known, 2 * draws.hit - 1, 0.0), up, np.where(known, 1 - up, 0.0))


def read_repeat(draws: Draws) -> Reading:
    """Do tokens repeat those that followed the same context before too often, or too rarely?

    It reveals errors that differ from context to context and cancel on average, given outputs that share contexts.
    """
    log_means = np.log1p(draws.seen_prob[:, :, None] * np.expm1(_REPEAT_STAKES))
    factors = draws.seen[:, :, None] * _REPEAT_STAKES - log_means
    return Reading(factors.reshape(len(draws.seen), -1), draws.seen - draws.seen_prob)


def _thresholds(uniforms: Array) -> Reading:
    below = (uniforms[:, None] < THRESHOLDS).astype(np.float64)
    log_means = np.log1p(THRESHOLDS[:, None] * np.expm1(_THRESHOLD_STAKES))
    factors = below[:, :, None] * _THRESHOLD_STAKES - log_means
    mean = uniforms[:, None] - 0.5
    return Reading(factors.reshape(len(uniforms), -1), np.concatenate([mean, below - THRESHOLDS], 1))


def _direction(sign: Array, up: Array, down: Array) -> Reading:
    """Bet on the sign, which is 1 with probability up and -1 with probability down."""
    stakes = DIRECTION_STAKES
    log_means = np.log1p(up[:, None] * np.expm1(stakes) + down[:, None] * np.expm1(-stakes))
    return Reading(sign[:, None] * stakes - log_means, (sign - up + down)[:, None])


def _log_sinhc(x: Array) -> Array:
    """ln(sinh(x) / x)."""
    safe = np.where(x == 0, 1.0, x)
    return np.where(x == 0, 0.0, np.log(np.sinh(safe) / safe))


_NUM_THRESHOLD_BETS = len(THRESHOLDS) * len(_THRESHOLD_STAKES)
_RANK = "mean rank of the token by probability, as a fraction of the mass"
_PLACE = "mean position of the token by id, as a fraction of the mass"
INSTRUMENTS: dict[str, Instrument] = {
    "pit_rank": Instrument(read_rank, _NUM_THRESHOLD_BETS, len(THRESHOLDS) + 1, _RANK, 1.0),
    "pit_id": Instrument(read_place, _NUM_THRESHOLD_BETS, len(THRESHOLDS) + 1, _PLACE, 1.0),
    "serial": Instrument(read_serial, len(_SERIAL_STAKES), 1, "correlation of neighbouring tokens", 2.0),
    "surprise": Instrument(read_surprise, len(EXPONENTS), 1, "mean probability of the token", 1.0),
    "lookup": Instrument(read_lookup, len(DIRECTION_STAKES), 1, "rate of prompt lookup's guesses", 2.0),
    "repeat": Instrument(
        read_repeat,
        len(RARITIES) * len(_REPEAT_STAKES),
        len(RARITIES),
        "rate of tokens that followed the same context before",
        1.0,
    ),
    "draft": Instrument(read_draft, len(DIRECTION_STAKES), 1, "rate of tokens the draft prefers", 2.0),
}
