"""Distances of a model's distributions from another's, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from specdec.conformance.faithfulness import faithfulness
from specdec.models.markov import MarkovModel


def model(*rows: list[float]) -> MarkovModel:
    """Distributions that depend on the last token alone."""
    return MarkovModel(torch.tensor(rows, dtype=torch.float64).expand(len(rows), -1, -1))


def test_distances_are_those_by_hand() -> None:
    """After token 0 the distributions are (1/2, 1/2) and (1/4, 3/4), after token 1 they are equal."""
    quantized = model([0.5, 0.5], [0.25, 0.75])
    reference = model([0.25, 0.75], [0.25, 0.75])
    found = faithfulness(quantized, reference, [[0, 1], [0]])
    kl_nats = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert found.tv.tolist() == pytest.approx([0.25, 0.0, 0.25])
    assert found.kl_nats.tolist() == pytest.approx([kl_nats, 0.0, kl_nats])
    assert (found.mean_tv, found.mean_kl_nats) == pytest.approx((1 / 6, 2 * kl_nats / 3))
    assert found.same_top in (1 / 3, 1.0)  # a tie


def test_a_token_that_never_comes_adds_nothing() -> None:
    quantized = model([1.0, 0.0], [0.5, 0.5])
    assert faithfulness(quantized, quantized, [[0, 1]]).kl_nats.tolist() == [0.0, 0.0]


def test_texts_without_tokens_are_refused() -> None:
    quantized = model([0.5, 0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="must have tokens; give at least one"):
        faithfulness(quantized, quantized, [[]])
