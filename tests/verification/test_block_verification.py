"""Block verification: its published example, its exact distribution, and at least as many accepted tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import distribution_rows
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec import Engine, SamplingParams
from specdec.conformance import mutants
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance, marginal, passes, radius
from specdec.conformance.mutants import maker, with_rule
from specdec.conformance.toys import joint_distribution, table
from specdec.models.markov import MarkovModel
from specdec.sampling.distributions import Dense
from specdec.sampling.randomness import uniforms
from specdec.verification import (
    Draft,
    VerificationRule,
    block_acceptance,
    block_weights,
    final_distribution,
    verify_block,
)

THIRDS = torch.tensor([[1, 2], [2, 1]]).double() / 3
# the first draft token has block weight 1/2, so the residual after it is (1, 0, 0), not (2/3, 1/3, 0)
M12_TARGET = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]], dtype=torch.float64)
M12_DRAFT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.25, 0.75]], dtype=torch.float64)
TOY_TARGET, TOY_DRAFT = THIRDS[:1].expand(3, 2), THIRDS[1:].expand(2, 2)


def outcomes(target: Tensor, draft: Tensor, length: int, *, token_residual: bool = False):
    """Every (draft path, accepted, probability, distribution of the final token), by the rule's own probabilities."""
    distributions = Dense(target.unsqueeze(0))
    for path in itertools.product(range(target.shape[1]), repeat=len(draft)):
        path_prob = math.prod(draft[i, token].item() for i, token in enumerate(path))
        if path_prob == 0:
            continue
        proposal = Draft(torch.tensor([path]), torch.tensor([length]), Dense(draft.unsqueeze(0)))
        weights = block_weights(distributions, proposal)
        passes = [1.0, *block_acceptance(distributions, proposal, weights)[0, :length].tolist()]
        for accepted in range(length + 1):
            probability = path_prob * passes[accepted] * math.prod(1 - p for p in passes[accepted + 1 :])
            weight = None if token_residual else weights[:, accepted : accepted + 1]
            yield (
                path,
                accepted,
                probability,
                final_distribution(distributions, proposal, torch.tensor([accepted]), weight).dense()[0],
            )


def completed_distribution(target: Tensor, steps) -> dict[tuple[int, ...], float]:
    """Joint distribution of one token per target row: a step's output, completed by plain decoding."""
    distribution: dict[tuple[int, ...], float] = {}
    for path, accepted, probability, last in steps:
        rows = [last, *target[accepted + 1 :]]
        for rest in itertools.product(range(target.shape[1]), repeat=len(rows)):
            tokens = (*path[:accepted], *rest)
            tail = math.prod(row[token].item() for row, token in zip(rows, rest, strict=True))
            distribution[tokens] = distribution.get(tokens, 0.0) + probability * tail
    return distribution


def plain_distribution(target: Tensor) -> dict[tuple[int, ...], float]:
    tokens = itertools.product(range(target.shape[1]), repeat=len(target))
    return {path: math.prod(target[i, token].item() for i, token in enumerate(path)) for path in tokens}


def expected_accepted(target: Tensor, draft: Tensor) -> float:
    return sum(accepted * probability for _, accepted, probability, _ in outcomes(target, draft, len(draft)))


def expected_accepted_by_token(target: Tensor, draft: Tensor) -> float:
    """Position i is accepted if all before it are; with independent rows the probabilities multiply."""
    rates = torch.minimum(target[: len(draft)], draft).sum(-1)
    return rates.cumprod(0).sum().item()


def test_published_toy_case() -> None:
    """Sun et al. 2024, section 3: expected accepted tokens 10/9 by token, 11/9 by block."""
    assert expected_accepted_by_token(TOY_TARGET, TOY_DRAFT) == pytest.approx(10 / 9, abs=1e-12)
    assert expected_accepted(TOY_TARGET, TOY_DRAFT) == pytest.approx(11 / 9, abs=1e-12)


@given(st.data(), st.integers(0, 2))
def test_a_step_completed_by_plain_decoding_has_the_target_distribution(data: st.DataObject, length: int) -> None:
    target, draft = data.draw(distribution_rows(3, 3)), data.draw(distribution_rows(2, 3))
    assert distance(completed_distribution(target, outcomes(target, draft, length)), plain_distribution(target)) < 1e-12


@given(distribution_rows(4, 3), distribution_rows(3, 3))
def test_never_fewer_accepted_than_token_by_token(target: Tensor, draft: Tensor) -> None:
    assert expected_accepted(target, draft) >= expected_accepted_by_token(target, draft) - 1e-12


def test_token_residual_under_block_verification_is_detected() -> None:
    """M12, with a draft whose first token can be accepted although its block weight is below 1."""
    target, draft = M12_TARGET, M12_DRAFT
    right, broken = (
        completed_distribution(target, outcomes(target, draft, 2, token_residual=wrong)) for wrong in (False, True)
    )
    assert distance(right, plain_distribution(target)) < 1e-12
    assert distance(broken, plain_distribution(target)) > 0.01
    steps = list(outcomes(target, draft, 2))
    assert any(accepted == 1 and path[0] == 0 and probability > 0 for path, accepted, probability, _ in steps)


def test_gate_catches_token_residual() -> None:
    """M12 through the sampler: 20,000 steps, alpha = beta = 1e-6, against the distribution of the first two tokens."""
    target, draft = M12_TARGET, M12_DRAFT
    distribution = marginal(plain_distribution(target), (0, 1))
    broken = marginal(completed_distribution(target, outcomes(target, draft, 2, token_residual=True)), (0, 1))
    num_draws = 20_000
    assert distance(broken, distribution) > 2 * radius(num_draws, 9)
    assert passes(first_two_tokens(verify_block, target, draft, num_draws), distribution, 9)
    assert not passes(first_two_tokens(mutants.block_with_token_residual, target, draft, num_draws), distribution, 9)


def first_two_tokens(rule: VerificationRule, target: Tensor, draft: Tensor, num_draws: int) -> list[tuple[int, ...]]:
    """The first two tokens of a step's output, completed by plain sampling."""
    rows = torch.arange(num_draws).unsqueeze(1)
    draws = uniforms(rows, torch.arange(10), torch.zeros(10, dtype=torch.int64), torch.tensor(0))
    drafts = Dense(draft.expand(num_draws, -1, -1))
    proposal = Draft(drafts.draw(draws[:, :2]), torch.full((num_draws,), 2), drafts)
    outcome = rule(Dense(target.expand(num_draws, -1, -1)), proposal, draws[:, 2:4], draws[:, 4:7])
    rest = Dense(target.expand(num_draws, -1, -1)).draw(draws[:, 7:])
    tokens = []
    for row in range(num_draws):
        accepted = outcome.accepted[row]
        emitted = [*proposal.tokens[row, :accepted], outcome.next_token[row], *rest[row, accepted + 1 :]]
        tokens.append((int(emitted[0]), int(emitted[1])))
    return tokens


def test_joint_distribution_through_the_real_loop() -> None:
    """All thresholds are 0, 1/4, 1/2 or 1 and every residual is one-hot, so a grid gives the exact distribution."""
    target, draft = MarkovModel(table(3, THIRDS)), MarkovModel(table(4, THIRDS))
    make = maker(target, draft, gamma=2, break_rule=with_rule(verify_block))
    assert distance(exact_distribution(make, (0, 1), 4, (3, 4, 3)), joint_distribution(target, (0, 1), 4)) < 1e-12


@given(st.data(), st.integers(0, 2))
def test_the_rule_follows_its_probabilities(data: st.DataObject, length: int) -> None:
    """The last position whose uniform is below its probability is accepted; a ragged draft ends at its length."""
    target, draft = data.draw(distribution_rows(3, 3)), data.draw(distribution_rows(2, 3))
    tokens = [row.multinomial(1).item() for row in draft]
    proposal = Draft(torch.tensor([tokens]), torch.tensor([length]), Dense(draft.unsqueeze(0)))
    distributions, uniforms = Dense(target.unsqueeze(0)), torch.rand(1, 2, dtype=torch.float64)
    passes = block_acceptance(distributions, proposal, block_weights(distributions, proposal))[0]
    expected = max([i + 1 for i in range(length) if uniforms[0, i] < passes[i]], default=0)
    assert verify_block(distributions, proposal, uniforms, torch.rand(1, 3).double()).accepted.item() == expected


def test_a_draft_from_the_target_s_distributions_passes_with_certainty() -> None:
    target = Dense(TOY_TARGET.unsqueeze(0))
    draft = Draft(torch.tensor([[0, 1]]), torch.tensor([2]), target[:, :2])
    assert block_acceptance(target, draft, block_weights(target, draft)).tolist() == [[1.0, 1.0]]


def test_engine_accepts_more_by_block_and_greedy_output_is_unchanged() -> None:
    target, draft = MarkovModel(THIRDS[0].expand(2, 2, 2)), MarkovModel(THIRDS[1].expand(2, 2, 2))

    def run(verification: str, temperature: float) -> list:
        engine = Engine(target, method="draft_model", draft=draft, verification=verification, max_batch_size=64)
        params = [SamplingParams(temperature=temperature, max_tokens=60, seed=i) for i in range(64)]
        return engine.generate([[0, 1]] * 64, params)

    by_token, by_block = (run(name, 1.0) for name in ("token", "block"))
    assert sum(c.counts.num_accepted for c in by_block) > sum(c.counts.num_accepted for c in by_token)
    assert [c.token_ids for c in run("token", 0)] == [c.token_ids for c in run("block", 0)]


def test_an_unknown_rule_is_rejected() -> None:
    with pytest.raises(ValueError, match="verification='magic' must be one of token, block"):
        Engine(MarkovModel(table(3, THIRDS)), verification="magic")
