"""The formulas of broken distributions are what the mutants emit: by enumeration of the real loop on a grid."""

from __future__ import annotations

import pytest
import torch

from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.mutants import MUTANTS
from specdec.conformance.statistics.sizes import BROKEN_DISTRIBUTIONS, total_variation
from specdec.conformance.toys import grid_pair

NUM_CELLS = 4  # all thresholds of the pair are quarters


@pytest.mark.parametrize("name", BROKEN_DISTRIBUTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_a_formula_is_the_distribution_of_its_mutant(name: str, seed: int) -> None:
    """The first token comes from the prefill; the second is the first of a step, and drafted as a third may follow."""
    target, draft = grid_pair(seed)
    distribution = exact_distribution(MUTANTS[name](target, draft, 1), (1, 2), 3, (NUM_CELLS, NUM_CELLS, NUM_CELLS))
    for first in range(3):
        rows = [model.table[2, first].double()[None] for model in (target, draft)]
        mass = [sum(distribution.get((first, second, third), 0.0) for third in range(3)) for second in range(3)]
        if sum(mass):
            found = [each / sum(mass) for each in mass]
            assert BROKEN_DISTRIBUTIONS[name](*rows)[0].tolist() == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("name", BROKEN_DISTRIBUTIONS)
def test_broken_distributions_are_distributions_and_without_a_draft_s_error_there_is_no_bug(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    target, draft = torch.randn(2, 40, 1000, generator=generator).double().mul(2).softmax(-1)
    draft[:, ::7] = 0
    draft /= draft.sum(-1, keepdim=True)
    broken = BROKEN_DISTRIBUTIONS[name](target, draft)
    assert broken.min() >= -1e-15
    assert broken.sum(-1) == pytest.approx(torch.ones(40).double(), abs=1e-9)
    if not name.startswith(("M1", "M4 draft")):
        assert total_variation(BROKEN_DISTRIBUTIONS[name](target, target), target).max() < 1e-9
    if not name.startswith("M5"):
        assert total_variation(broken, target).mean() > 0.01


def test_distances() -> None:
    distributions = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert total_variation(distributions, torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])).tolist() == [0.25, 1.0]
