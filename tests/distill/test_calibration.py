"""Calibration of a draft's confidence: the error by hand, and drafts whose confidence is right or wrong by design."""

from __future__ import annotations

import math

import pytest
import torch

from specdec import SamplingParams
from specdec.distill.evaluation.calibration import Calibration, calibrate, observe, table
from specdec.models.markov import MarkovModel


def test_bins_and_error_by_hand() -> None:
    found = calibrate([[(0.95, True), (0.95, True), (0.92, False)], [(0.25, False), (0.15, True)]])
    assert [(each.number, each.accepted) for each in found.bins] == [(1, 1.0), (1, 0.0), (3, 2 / 3)]
    assert [each.confidence for each in found.bins] == pytest.approx([0.15, 0.25, 0.94])
    assert found.error == pytest.approx((0.85 + 0.25 + 3 * (0.94 - 2 / 3)) / 5)
    assert found.scale == pytest.approx(3 / 3.22)
    assert found.interval[0] <= found.error <= found.interval[1]


def test_nothing_observed_is_refused() -> None:
    with pytest.raises(ValueError, match="no draft position was tested"):
        calibrate([[], []])


def test_the_table_names_the_error() -> None:
    text = table(calibrate([[(0.95, True), (0.5, False)]]))
    assert "expected calibration error 0.275 [0.275, 0.275]" in text
    assert text.splitlines()[2].split() == ["0.950", "1.000", "1", "#" * 20]


def rows(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).expand(4, 4, 4).contiguous()


TARGET = rows(0.6, 0.2, 0.1, 0.1)
TRUE, SURE = TARGET, rows(0.97, 0.01, 0.01, 0.01)


def calibration(draft: torch.Tensor, temperature: float) -> Calibration:
    sampling = SamplingParams(temperature=temperature, max_tokens=200, seed=3, ignore_eos=True)
    prompts = [[0, 1], [1, 2], [2, 3], [3, 1]]
    return calibrate(observe(MarkovModel(TARGET), MarkovModel(draft), prompts, sampling, 4))


def test_an_overconfident_draft_is_seen() -> None:
    """It draws its favorite with 0.97, which is accepted with 0.6 / 0.97; others are always accepted."""
    found, expected = calibration(SURE, 1.0), 0.6 + 0.03
    tested = sum(each.number for each in found.bins)
    (only,) = found.bins
    assert only.confidence == pytest.approx(0.97)
    assert abs(only.accepted - expected) < 5 * math.sqrt(expected * (1 - expected) / tested)
    assert found.error == pytest.approx(0.97 - only.accepted)


def test_the_targets_own_distribution_is_always_accepted_and_underconfident() -> None:
    found = calibration(TRUE, 1.0)
    assert [(each.confidence, each.accepted) for each in found.bins] == [(pytest.approx(0.6), 1.0)]
    assert found.scale == pytest.approx(1 / 0.6)


def test_every_tested_position_counts_once() -> None:
    """At temperature 0 the favorite is always accepted: 3 of 4 positions per step are recorded."""
    found = calibration(SURE, 0.0)
    (only,) = found.bins
    assert only.accepted == 1.0
    assert only.number >= 4 * 3 * (200 // 5 - 1)
