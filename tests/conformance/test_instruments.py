"""Each instrument's bets are fair, and its statistics centred, by adding up every token that may come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from specdec.conformance.statistics.contexts import seen_before
from specdec.conformance.statistics.facts import Facts
from specdec.conformance.statistics.instruments import INSTRUMENTS, THRESHOLDS, Draws, Reading, _log_sinhc

N = 64  # every probability and every threshold is a multiple of 1/N
DISTRIBUTION = torch.tensor([20, 0, 4, 4, 1, 35]).double() / N
DRAFT = torch.tensor([4, 10, 4, 30, 6, 10]).double() / N


def seen(rows: torch.Tensor, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """The fields on earlier tokens, of which 1, 3 and 4 followed every context."""
    return dict(
        zip(
            ("seen_prob", "seen"),
            seen_before(rows, tokens, [{1, 3, 4} & {*range(rows.shape[1])}] * len(tokens)),
            strict=True,
        )
    )


def every_draw(
    distribution: torch.Tensor = DISTRIBUTION, emitted: torch.Tensor = DISTRIBUTION
) -> tuple[Draws, np.ndarray]:
    """All tokens under one distribution, each with the midpoints of its part of [0, 1), and the emitted weights."""
    cells = [
        (token, (i + 0.5) / count)
        for token, count in enumerate((distribution * N).long().tolist())
        for i in range(count)
    ]
    tokens, inside = torch.tensor([token for token, _ in cells]), np.array([place for _, place in cells])
    of = Facts.of(distribution.expand(len(cells), -1), tokens, DRAFT.expand(len(cells), -1))
    draws = Draws(
        facts=of,
        rank=of.above + inside * of.prob,
        place=of.before + inside * of.prob,
        place_before=np.full(len(cells), 0.8),
        guess_prob=np.full(len(cells), float(distribution[3])),
        hit=(tokens == 3).double().numpy(),
        **seen(distribution.expand(len(cells), -1), tokens),
    )
    return draws, (emitted[tokens] / distribution[tokens] / N).numpy()


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_bets_are_fair_and_statistics_centred(name: str) -> None:
    instrument = INSTRUMENTS[name]
    draws, weights = every_draw()
    reading = instrument.read(draws)
    # the serial bet's mean is an integral, which 64 midpoints meet to 1e-4
    tolerance = 1e-4 if name == "serial" else 1e-12
    assert weights @ np.exp(reading.log_factors) == pytest.approx(np.ones(instrument.num_bets), abs=tolerance)
    assert weights @ reading.shifts == pytest.approx(np.zeros(instrument.num_statistics), abs=1e-12)
    assert np.ptp(reading.shifts[:, 0]) <= instrument.span


@pytest.mark.parametrize("name", [name for name in INSTRUMENTS if name != "serial"])
def test_another_distribution_makes_some_bet_grow(name: str) -> None:
    draws, weights = every_draw(emitted=(DISTRIBUTION * torch.tensor([0.5, 1, 1, 2, 1, 1])))
    growth = weights / weights.sum() @ INSTRUMENTS[name].read(draws).log_factors
    assert growth.max() > 0


def test_neighbours_that_share_a_uniform_make_a_serial_bet_grow() -> None:
    draws, weights = every_draw()
    shared = replace(draws, place_before=draws.place)
    assert (weights @ INSTRUMENTS["serial"].read(shared).log_factors).max() > 0.02


def test_an_impossible_token_ends_no_martingale() -> None:
    rows, token = DISTRIBUTION[None], torch.tensor([1])
    half = np.array([0.5])
    draws = Draws(Facts.of(rows, token), half, half, half, np.array([np.nan]), half * 0, **seen(rows, token))
    reading: Reading = INSTRUMENTS["surprise"].read(draws)
    assert not reading.log_factors.any()
    assert INSTRUMENTS["repeat"].read(draws).log_factors[:, :4].max() < 0  # no gain, though the token was seen before


def test_no_guess_is_no_bet() -> None:
    draws, _ = every_draw()
    unknown = np.full(len(draws.rank), np.nan)
    silent = replace(draws, guess_prob=unknown, hit=np.zeros(len(unknown)))
    reading = INSTRUMENTS["lookup"].read(silent)
    assert not reading.log_factors.any()
    assert not reading.shifts.any()


def test_sign_statistic_by_hand() -> None:
    """The draft gives tokens 1, 3 and 4 more, the target 0 and 5: mean 5/64 - 55/64."""
    draws, _ = every_draw()
    reading = INSTRUMENTS["draft"].read(draws)
    assert reading.shifts[0, 0] == pytest.approx(-1 + 50 / 64)
    assert reading.shifts[20, 0] == pytest.approx(0 + 50 / 64)  # token 2: equal


def draws_of(**changes: np.ndarray) -> Draws:
    """Two tokens of one distribution, with the fields that are given."""
    rows, tokens = torch.tensor([[1.0, 0.0]] * 2).double(), torch.tensor([0, 1])
    fields = dict.fromkeys(("rank", "place", "place_before", "guess_prob", "hit"), np.array([0.5, 0.5]))
    return Draws(Facts.of(rows, tokens), **fields | seen(rows, tokens) | changes)


def test_the_serial_statistic_by_hand() -> None:
    """2 * 0.8 - 1 times 2 * 0.3 - 1, and 2 * 0.1 - 1 times 2 * 0.9 - 1."""
    reading = INSTRUMENTS["serial"].read(draws_of(place_before=np.array([0.8, 0.1]), place=np.array([0.3, 0.9])))
    assert reading.shifts[:, 0] == pytest.approx([0.6 * -0.4, -0.8 * 0.8])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("pit_rank", {"rank": [0.0, 1.0]}),
        ("pit_id", {"place": [0.0, 1.0]}),
        ("serial", {"place_before": [1.0, 1.0], "place": [0.0, 1.0]}),
        ("surprise", {}),  # a certain token, and an impossible one
        ("lookup", {"hit": [0.0, 1.0]}),
        ("repeat", {"seen_prob": [[0.5] * 4] * 2, "seen": [[0.0] * 4, [1.0] * 4]}),
    ],
)
def test_a_span_is_that_of_the_extremes(name: str, fields: dict[str, list[float]]) -> None:
    reading = INSTRUMENTS[name].read(draws_of(**{key: np.array(values) for key, values in fields.items()}))
    assert np.ptp(reading.shifts[:, 0]) == INSTRUMENTS[name].span


def test_drafts_span_as_much_as_guesses() -> None:
    assert INSTRUMENTS["draft"].span == INSTRUMENTS["lookup"].span  # a sign less its mean, for both


def test_thresholds_rise_and_are_alike_at_both_ends() -> None:
    assert (np.diff(THRESHOLDS) > 0).all()
    assert (1 - THRESHOLDS[::-1]).tolist() == THRESHOLDS.tolist()
    assert THRESHOLDS.tolist()[:5] == [1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2]


@pytest.mark.parametrize("x", [-2.0, -1.0, -1e-9, 0.0, 1e-9, 1.0, 2.0])
def test_the_logarithm_of_a_mean_exponential(x: float) -> None:
    """Of exp(x * u) for u uniform on [-1, 1]: x^2 / 6 near 0."""
    expected = np.log(np.sinh(x) / x) if abs(x) > 1e-6 else x * x / 6
    assert _log_sinhc(np.array([x]))[0] == pytest.approx(expected, abs=1e-12)
