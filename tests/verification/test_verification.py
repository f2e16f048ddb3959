"""Token verification: identities under Hypothesis, the exact distribution of a step by enumeration, edge cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.strategies import distribution_rows, distributions
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specdec.conformance import mutants
from specdec.sampling.distributions import Dense, OneHot
from specdec.trees.shape import Tree
from specdec.verification import (
    Draft,
    VerificationRule,
    final_distribution,
    residual,
    verify_block,
    verify_coupled,
    verify_tokens,
)

LARGEST = 1 - 2.0**-53  # the largest possible uniform


@given(distributions(), distributions())
def test_accepting_and_recovering_give_the_target(target: Tensor, draft: Tensor) -> None:
    kept = torch.minimum(target, draft)
    assert torch.allclose(kept + (1 - kept.sum()) * residual(target, Dense(draft)), target, atol=1e-15)


@given(distributions(), distributions())
def test_residual_is_a_distribution_with_no_mass_where_the_draft_has_more(target: Tensor, draft: Tensor) -> None:
    distribution = residual(target, Dense(draft))
    assert distribution.sum().item() == pytest.approx(1)
    if not torch.equal(target, draft):
        assert not distribution[draft >= target].any()


@given(distributions())
def test_residual_of_equal_distributions_is_the_distribution(distribution: Tensor) -> None:
    assert torch.equal(residual(distribution, Dense(distribution)), distribution)


@pytest.mark.parametrize("size", [3, 5])
def test_residual_rejects_mismatched_shapes(size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"target_probs of shape \({size},\) must have the shape of the draft distributions, \(4,\)"
    ):
        residual(torch.ones(size) / size, Dense(torch.ones(4) / 4))


def step_distribution(target: Tensor, draft: Tensor, length: int) -> dict[tuple[int, ...], float]:
    """Distribution of a step's output, summed over all draft paths and outcomes; target [k + 1, v], draft [k, v]."""
    num_drafted, vocab_size = draft.shape
    distribution: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(vocab_size), repeat=num_drafted):
        path_prob = torch.stack([draft[i, token] for i, token in enumerate(path)]).prod().item()
        if not path_prob:
            continue
        rows = Draft(torch.tensor([path]), torch.tensor([length]), Dense(draft.unsqueeze(0)))
        accepts = [min(1.0, (target[i, t] / draft[i, t]).item()) for i, t in enumerate(path[:length])] + [0.0]
        for accepted in range(length + 1):
            # uniforms just below and at each threshold are tested below
            probability = path_prob * math.prod(accepts[:accepted]) * (1 - accepts[accepted])
            last = final_distribution(Dense(target.unsqueeze(0)), rows, torch.tensor([accepted])).dense()[0]
            for token in range(vocab_size):
                output = (*path[:accepted], token)
                distribution[output] = distribution.get(output, 0.0) + probability * last[token].item()
    return distribution


@given(st.data(), st.integers(0, 2))
def test_every_prefix_of_a_step_has_the_target_distribution(data: st.DataObject, length: int) -> None:
    """k = 2 draft tokens, `length` of them valid: P(first token), and P(second | first) if a second is emitted."""
    target, draft = data.draw(distribution_rows(3, 3)), data.draw(distribution_rows(2, 3))
    distribution = step_distribution(target, draft, length)
    assert sum(distribution.values()) == pytest.approx(1, abs=1e-12)
    for depth in range(length + 1):
        longer = {output: p for output, p in distribution.items() if len(output) > depth}
        total = sum(longer.values())
        for token in range(3):
            marginal = sum(p for output, p in longer.items() if output[depth] == token)
            assert marginal == pytest.approx(total * target[depth, token].item(), abs=1e-12)


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@given(target=distribution_rows(2), draft=distribution_rows(1), token=st.integers(0, 3))
def test_accept_threshold_is_exact(rule: VerificationRule, target: Tensor, draft: Tensor, token: int) -> None:
    """Accept strictly below target/draft, reject at it; an impossible token is always rejected, even at u = 0."""
    if not draft[0, token]:
        return
    threshold = min(1.0, (target[0, token] / draft[0, token]).item())
    below, at = threshold * (1 - 1e-12), threshold

    def accepted(uniform: float, rule: VerificationRule = rule) -> int:
        proposal = Draft(torch.tensor([[token]]), torch.tensor([1]), Dense(draft.unsqueeze(0)))
        uniforms = torch.tensor([[uniform]], dtype=torch.float64)
        outcome = rule(Dense(target.unsqueeze(0)), proposal, uniforms, torch.full((1, 2), 0.5).double())
        return int(outcome.accepted)

    if threshold > 0:
        assert accepted(below) == accepted(0.0) == 1
    else:
        assert accepted(0.0) == 0
        assert accepted(0.0, mutants.accept_at_equality) == 1  # M5
    if threshold < 1:
        assert accepted(at * (1 + 1e-12) if at else at) == accepted(LARGEST) == 0
    else:
        assert accepted(LARGEST) == 1


@given(distribution_rows(3), st.tuples(st.integers(0, 3), st.integers(0, 3)), st.integers(0, 2), st.data())
def test_one_hot_and_dense_forms_of_the_same_draft_agree(target: Tensor, tokens: tuple, length: int, data) -> None:
    uniform = st.floats(0, LARGEST)
    accept = torch.tensor([data.draw(st.lists(uniform, min_size=2, max_size=2))], dtype=torch.float64)
    final = torch.tensor([data.draw(st.lists(uniform, min_size=3, max_size=3))], dtype=torch.float64)
    sparse = Draft.deterministic(torch.tensor([tokens]), torch.tensor([length]), 4)
    dense = Draft(sparse.tokens, sparse.num_proposed, Dense(sparse.distribution.dense().double()))
    first, second = (verify_tokens(Dense(target.unsqueeze(0)), draft, accept, final) for draft in (sparse, dense))
    assert torch.equal(first.accepted, second.accepted)
    assert torch.equal(first.next_token, second.next_token)


def test_greedy_targets_need_no_probabilities() -> None:
    """One-hot on both sides: draft tokens are accepted while they match the target's, then the target's is emitted."""
    target = OneHot(torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7]]), vocab_size=9)
    draft = Draft.deterministic(torch.tensor([[5, 6], [5, 0], [5, 6]]), torch.tensor([2, 2, 1]), 9)
    result = verify_tokens(target, draft, torch.zeros(3, 2).double(), torch.zeros(3, 3).double())
    assert result.accepted.tolist() == [2, 1, 1]
    assert result.next_token.tolist() == [7, 6, 6]


def test_padding_of_a_ragged_draft_is_never_accepted() -> None:
    certain = OneHot(torch.tensor([[1, 1, 1]]), vocab_size=3)
    draft = Draft.deterministic(torch.tensor([[1, 1]]), torch.tensor([0]), 3)
    assert verify_tokens(certain, draft, torch.zeros(1, 2).double(), torch.zeros(1, 3).double()).accepted.item() == 0


def test_a_draft_must_carry_a_distribution_for_each_token() -> None:
    for size in (1, 3):
        with pytest.raises(ValueError, match=rf"shape \(1, {size}\) must have shape \(1, 2\), one row per token"):
            Draft(torch.zeros(1, 2).long(), torch.ones(1).long(), OneHot(torch.zeros(1, size).long(), 5))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_draft_has_a_number_of_proposed_tokens_for_each_row(num_rows: int) -> None:
    with pytest.raises(ValueError, match=rf"num_proposed of shape \({num_rows},\) must have shapes \[batch, k\] and"):
        Draft(torch.zeros(2, 2).long(), torch.ones(num_rows).long(), OneHot(torch.zeros(2, 2).long(), 5))


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1)])
def test_tokens_of_a_draft_have_two_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \(2,.*\) and num_proposed of shape \(2,\) must have shapes"):
        Draft(torch.zeros(shape).long(), torch.ones(2).long(), OneHot(torch.zeros(shape).long(), 5))


def test_a_draft_tree_must_have_a_node_for_each_token_and_a_distribution_for_each_family() -> None:
    tokens, lengths = torch.zeros(1, 2).long(), torch.ones(1).long()
    of_two = OneHot(torch.zeros(1, 2).long(), 5)
    assert Draft(tokens, lengths, of_two, Tree.chain(2)).tree == Tree.chain(2)
    with pytest.raises(ValueError, match="tree of 3 nodes must have one node per token, 2"):
        Draft(tokens, lengths, of_two, Tree.chain(3))
    with pytest.raises(ValueError, match="tree of 1 nodes must have one node per token, 2"):
        Draft(tokens, lengths, of_two, Tree.chain(1))
    with pytest.raises(ValueError, match=r"must have shape \(1, 1\), one row per family of siblings"):
        Draft(tokens, lengths, of_two, Tree.balanced([2]))


def test_each_distribution_of_a_draft_is_valid_or_not() -> None:
    tokens, lengths = torch.zeros(1, 2).long(), torch.ones(1).long()
    distribution = OneHot(tokens, 5)
    finite = torch.tensor([[True, False]])
    assert Draft(tokens, lengths, distribution, finite=finite).finite is finite
    for length in (1, 3):
        with pytest.raises(ValueError, match=rf"finite of shape \(1, {length}\) must have the distribution's shape"):
            Draft(tokens, lengths, distribution, finite=torch.ones(1, length, dtype=torch.bool))


@pytest.mark.parametrize("rule", [verify_tokens, verify_block, verify_coupled])
@pytest.mark.parametrize(("lengths", "last"), [([2, 0], [0, 1]), ([1, 2], [2, 0])])
def test_rows_accept_what_they_proposed(rule, lengths: list[int], last: list[int]) -> None:
    """Two rows with the same two correct tokens, of which each proposes its own number; then the target's next one."""
    target = Dense(OneHot(torch.tensor([[1, 2, 0]] * 2), 3).dense().double())
    draft = Draft.deterministic(torch.tensor([[1, 2]] * 2), torch.tensor(lengths), 3)
    noise = torch.full((2, 3, 3), 0.5, dtype=torch.float64)
    outcome = rule(target, draft, noise[:, :2, 0], noise if rule.needs_noise else noise[..., 0])
    assert (outcome.accepted.tolist(), outcome.next_token.tolist()) == (lengths, last)


@pytest.mark.parametrize("rule", [verify_tokens, verify_block, verify_coupled])
def test_any_token_but_the_certain_one_is_rejected(rule: VerificationRule) -> None:
    target = Dense(OneHot(torch.ones(3, 2).long(), 3).dense().double())
    draft = Draft.deterministic(torch.tensor([[0], [1], [2]]), torch.ones(3).long(), 3)
    noise = torch.full((3, 2, 3), 0.5, dtype=torch.float64)
    outcome = rule(target, draft, noise[:, :1, 0], noise if rule.needs_noise else noise[..., 0])
    assert (outcome.accepted.tolist(), outcome.next_token.tolist()) == ([0, 1, 0], [1, 1, 1])


def test_what_the_rules_need() -> None:
    needs = [(rule.needs_noise, rule.always_draws) for rule in (verify_tokens, verify_block, verify_coupled)]
    assert needs == [(False, False), (False, False), (True, False)]


@given(distributions(6), st.floats(0, LARGEST))
def test_a_draw_is_where_the_cumulative_distribution_first_exceeds_the_uniform(
    distribution: Tensor, uniform: float
) -> None:
    token = Dense(distribution.unsqueeze(0)).draw(torch.tensor([uniform], dtype=torch.float64)).item()
    cumulative = distribution.cumsum(0)
    assert distribution[token] > 0
    assert cumulative[token] > uniform * cumulative[-1]
    assert token == 0 or cumulative[token - 1] <= uniform * cumulative[-1]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=7).filter(any))
def test_draws_over_a_grid_of_uniforms_are_the_distribution(weights: list[int]) -> None:
    """With one midpoint per unit of weight the counts are the weights."""
    total = sum(weights)
    midpoints = (torch.arange(total).double() + 0.5) / total
    tokens = Dense(torch.tensor(weights).double().expand(total, -1)).draw(midpoints)
    assert torch.bincount(tokens, minlength=len(weights)).tolist() == weights
