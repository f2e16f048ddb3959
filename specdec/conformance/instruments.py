"""The instruments of an audit: statistics of emitted tokens whose distribution is known if the engine is lossless.

Each looks at some tokens and returns bets, for `betting.Wealth`, and statistics less their exact means. A statistic may
depend on everything before its token, so on the distribution, the draft and the prefix, and on nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specdec.conformance.betting import DIRECTION_STAKES, both_signs
from specdec.conformance.facts import EXPONENTS, Facts

Array = NDArray[np.float64]

# more of them where there is less mass: what likely tokens lose or gain is a large part of a small number
THRESHOLDS = np.array([1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 15 / 16, 63 / 64])
_THRESHOLD_STAKES = both_signs(2, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
_SERIAL_STAKES = both_signs(1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """What the instruments look at: n tokens in the order in which they are judged, arrays float64 [n].

    facts: of the distribution and the token. rank, place: the probability integral transform with tokens in the order
    of their probabilities, or of their ids, made continuous by a uniform number; uniform and independent if the
    distribution holds.
    place_before: that of the token judged before, 1/2 for the first.
    guess_prob: of the token that prompt lookup guesses, NaN where it has no guess. hit: whether that is the token.
    """

    facts: Facts
    rank: Array
    place: Array
    place_before: Array
    guess_prob: Array
    hit: Array


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What an instrument makes of n tokens.

    log_factors: float64 [n, bets]. shifts: float64 [n, statistics], less their exact means; the first is told.
    """

    log_factors: Array
    shifts: Array


@dataclass(frozen=True, slots=True)
class Instrument:
    """read: what it makes of tokens. num_bets, num_statistics: columns of that.

    statistic: the one that is told, in words. span: its largest value minus its smallest.
    """

    read: Callable[[Draws], Reading]
    num_bets: int
    num_statistics: int
    statistic: str
    span: float


def read_rank(draws: Draws) -> Reading:
    """Does the token stand where it should among the likelier and the less likely ones?"""
    return _thresholds(draws.rank)


def read_place(draws: Draws) -> Reading:
    """The same in the order of token ids, in which cumulative sums are searched: shows uniforms that are used twice."""
    return _thresholds(draws.place)


def read_serial(draws: Draws) -> Reading:
    """Do neighbouring tokens come from independent uniforms? The mean of exp(stake * u) is known for u in [-1, 1]."""
    before, now = 2 * draws.place_before - 1, 2 * draws.place - 1
    stakes = before[:, None] * _SERIAL_STAKES
    return Reading(stakes * now[:, None] - _log_sinhc(stakes), (before * now)[:, None])


def read_surprise(draws: Draws) -> Reading:
    """Is the text as likely as it should be? Bets that the distribution was sharpened or flattened."""
    facts = draws.facts
    possible = facts.prob > 0  # a token without probability is an error by itself, and ends no martingale
    logs = np.log(np.where(possible, facts.prob, 1.0))
    factors = np.where(possible[:, None], logs[:, None] * EXPONENTS - facts.tempered, 0.0)
    return Reading(factors, (facts.prob - facts.collision)[:, None])


def read_draft(draws: Draws) -> Reading:
    """Does the text lean to what the draft likes better than the target does?"""
    return _direction(draws.facts.sign, draws.facts.up, draws.facts.down)


def read_lookup(draws: Draws) -> Reading:
    """Does the text lean to what prompt lookup would copy? A draft that can always be tried."""
    known = np.isfinite(draws.guess_prob)
    up = np.where(known, draws.guess_prob, 0.0)
    return _direction(np.where(known, 2 * draws.hit - 1, 0.0), up, np.where(known, 1 - up, 0.0))


def _thresholds(uniforms: Array) -> Reading:
    below = (uniforms[:, None] < THRESHOLDS).astype(np.float64)
    log_means = np.log1p(THRESHOLDS[:, None] * np.expm1(_THRESHOLD_STAKES))
    factors = below[:, :, None] * _THRESHOLD_STAKES - log_means
    mean = uniforms[:, None] - 0.5
    return Reading(factors.reshape(len(uniforms), -1), np.concatenate([mean, below - THRESHOLDS], 1))


def _direction(sign: Array, up: Array, down: Array) -> Reading:
    """Bets on f = sign, which is 1 with probability up and -1 with probability down."""
    stakes = DIRECTION_STAKES
    log_means = np.log1p(up[:, None] * np.expm1(stakes) + down[:, None] * np.expm1(-stakes))
    return Reading(sign[:, None] * stakes - log_means, (sign - up + down)[:, None])


def _log_sinhc(x: Array) -> Array:
    """ln(sinh(x) / x)."""
    safe = np.where(x == 0, 1.0, x)
    return np.where(x == 0, 0.0, np.log(np.sinh(safe) / safe))


_NUM_THRESHOLD_BETS = len(THRESHOLDS) * len(_THRESHOLD_STAKES)
_RANK = "mean rank of the token, as a share of probability"
_PLACE = "mean place of the token in the order of ids, as a share of probability"
INSTRUMENTS: dict[str, Instrument] = {
    "pit_rank": Instrument(read_rank, _NUM_THRESHOLD_BETS, len(THRESHOLDS) + 1, _RANK, 1.0),
    "pit_id": Instrument(read_place, _NUM_THRESHOLD_BETS, len(THRESHOLDS) + 1, _PLACE, 1.0),
    "serial": Instrument(read_serial, len(_SERIAL_STAKES), 1, "correlation of neighbouring places", 2.0),
    "surprise": Instrument(read_surprise, len(EXPONENTS), 1, "mean probability of the token", 1.0),
    "lookup": Instrument(read_lookup, len(DIRECTION_STAKES), 1, "how often what lookup guesses comes", 2.0),
    "draft": Instrument(read_draft, len(DIRECTION_STAKES), 1, "how often what the draft prefers comes", 2.0),
}
