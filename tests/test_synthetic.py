"""Prescribed acceptance: the rates are the requested ones, and it cannot be mistaken for verification."""

from __future__ import annotations

import pytest
import torch

from specdec import AcceptanceCounts, Engine, SamplingParams
from specdec.conformance.gates import radius
from specdec.conformance.toys import grid_pair
from specdec.sampling.distributions import OneHot
from specdec.synthetic import SyntheticAcceptance
from specdec.verification import Draft

TARGET, DRAFT = grid_pair(3)


def test_conditional_thresholds_exactly() -> None:
    """0.75, then 0.5 / 0.75; the third position is never reached."""
    rule = SyntheticAcceptance((0.75, 0.5))
    target = OneHot(torch.tensor([[0, 1, 2, 0]]), 3)
    draft = Draft.deterministic(torch.tensor([[2, 2, 2]]), torch.tensor([3]), 3)
    for uniforms, accepted in (((0.74, 0.66, 0.0), 2), ((0.74, 0.67, 0.0), 1), ((0.76, 0.0, 0.0), 0)):
        outcome = rule(target, draft, torch.tensor([uniforms], dtype=torch.float64), torch.zeros(1, 4))
        assert outcome.accepted.tolist() == [accepted]
        assert outcome.next_token.tolist() == [[0, 1, 2, 0][accepted]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rates_come_out(temperature: float) -> None:
    rates, num_tokens = [0.8, 0.5, 0.1], 4000
    engine = Engine(
        TARGET,
        method="draft_model",
        draft=DRAFT,
        num_speculative_tokens=4,
        max_batch_size=4,
        synthetic_acceptance_rates=rates,
    )
    sampling = [SamplingParams(temperature=temperature, max_tokens=num_tokens, seed=seed) for seed in range(4)]
    counts = AcceptanceCounts.total(each.counts for each in engine.generate([[0], [1], [2], [0, 1]], sampling))
    bound = 2 * radius(counts.num_steps, 2)
    assert bound < 0.1
    for measured, asked in zip(counts.acceptance_rate_at, [*rates, 0.0], strict=True):
        assert abs(measured - asked) < bound


@pytest.mark.parametrize("rates", [[], [1.1], [-0.1], [0.5, 0.6]])
def test_impossible_rates_are_refused(rates: list[float]) -> None:
    with pytest.raises(ValueError, match=r"synthetic_acceptance_rates=.* must be probabilities that never increase"):
        Engine(TARGET, method="ngram", synthetic_acceptance_rates=rates)
