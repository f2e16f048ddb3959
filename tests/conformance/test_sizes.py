"""The formulas of broken distributions are what the mutants emit: by enumeration of the real loop on a grid."""

from __future__ import annotations

import pytest
import torch

from specdec import SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import radius
from specdec.conformance.mutants import MUTANTS
from specdec.conformance.mutants.proposals import drawn_by_bfloat16_sums
from specdec.conformance.statistics.sizes import BROKEN_DISTRIBUTIONS, total_variation
from specdec.conformance.toys import grid_pair
from specdec.models.markov import MarkovModel
from specdec.requests import Request
from specdec.sampling.distributions import Dense
from specdec.sampling.randomness import Role, noise, uniforms
from specdec.verification import residual, verify_tokens

ROLES = (Role.ACCEPT, Role.DRAFT, Role.RECOVER)
NUM_CELLS = 4  # all thresholds of the pair are quarters


ON_THE_GRID = [name for name in BROKEN_DISTRIBUTIONS if not name.startswith(("M14", "M15"))]


@pytest.mark.parametrize("name", ON_THE_GRID)
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
    if not name.startswith(("M1 ", "M4 draft", "M15", "M20")):
        assert total_variation(BROKEN_DISTRIBUTIONS[name](target, target), target).max() < 1e-9
    if not name.startswith(("M5", "M20")):  # M20 needs likely tokens, of which there are few here
        assert total_variation(broken, target).mean() > 0.01


SPREAD = torch.randn(2, 6, generator=torch.Generator().manual_seed(3)).double().mul(1.5).softmax(-1)
POSITION = 3  # of the first token of a step, after two of the prompt and one of the prefill


@pytest.mark.parametrize("name", ["M14 proposal noise reused", "M15 draft drawn in low precision"])
def test_mutants_that_no_grid_fits_draw_as_their_formula_assumes(name: str) -> None:
    """Token for token: which token is proposed, when it is accepted, and what is drawn in its place."""
    target, draft = SPREAD
    seeds = torch.arange(300)
    models = [MarkovModel(row.expand(6, 6, 6)) for row in (target, draft)]
    requests = [Request(int(seed), (1, 2), SamplingParams(max_tokens=3, seed=int(seed))) for seed in seeds]
    rows = sorted(MUTANTS[name](*models, 1)(uniforms, verify_tokens, 300).run(requests), key=lambda r: r.request.index)
    at, everywhere = torch.tensor(POSITION), [Dense(row.expand(300, 6)) for row in (target, draft)]
    accept, propose, recover = (uniforms(seeds, at, torch.tensor(role), at) for role in ROLES)
    if name.startswith("M14"):
        propose = recover = noise(seeds, torch.full((300, 1), POSITION), 6)[:, 0]
    else:
        everywhere[1] = Dense(drawn_by_bfloat16_sums(draft).expand(300, 6))
    proposed = everywhere[1].draw(propose)
    recovered = Dense(residual(target, Dense(draft)).expand(300, 6)).draw(recover)
    expected = torch.where(accept * draft[proposed] < target[proposed], proposed, recovered)
    assert [row.output[1] for row in rows] == expected.tolist()
    assert len({step.num_accepted for row in rows for step in row.steps}) == 2


def test_the_formula_of_reused_noise_is_the_distribution_of_the_race() -> None:
    """By 400,000 races; the gate fails falsely with probability at most 1e-6, for any seed."""
    target, draft = SPREAD
    num_draws, generator = 400_000, torch.Generator().manual_seed(1)
    shared = torch.rand(num_draws, 6, dtype=torch.float64, generator=generator)
    accept = torch.rand(num_draws, dtype=torch.float64, generator=generator)
    proposed = Dense(draft.expand(num_draws, 6)).draw(shared)
    recovered = Dense(residual(target, Dense(draft)).expand(num_draws, 6)).draw(shared)
    emitted = torch.where(accept * draft[proposed] < target[proposed], proposed, recovered)
    found = torch.bincount(emitted, minlength=6).double() / num_draws
    formula = BROKEN_DISTRIBUTIONS["M14 proposal noise reused"](target[None], draft[None])[0]
    assert total_variation(formula, target) > 2 * radius(num_draws, 6)
    assert total_variation(found, formula) < radius(num_draws, 6)


def test_a_race_that_is_not_reused_is_fair() -> None:
    """Where the draft gives nothing to the residual's tokens, its race says nothing about the order of those tokens."""
    target, draft = torch.tensor([[0.2, 0.5, 0.3]]).double(), torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert BROKEN_DISTRIBUTIONS["M14 proposal noise reused"](target, draft)[0].tolist() == pytest.approx(
        [0.2, 0.5, 0.3]
    )


def test_distances() -> None:
    distributions = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert total_variation(distributions, torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])).tolist() == [0.25, 1.0]
