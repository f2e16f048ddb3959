"""Mutants in a decoder of a real architecture: each does something, and runs to the end."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from helpers import tiny

from specdec import SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.mutants import MUTANTS, REPORT_MUTANTS, Maker, maker
from specdec.conformance.mutants.proposals import prompt_lookup
from specdec.conformance.toys import HALVES, grid_pair, joint_distribution, table
from specdec.heads.eagle import new_head
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel
from specdec.proposers.heads.eagle import EagleProposer
from specdec.requests import Request
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_block, verify_tokens

PARAMS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, top_k=3),
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(max_tokens=12, logit_bias={7: 6.0, 8: 6.0}),
    SamplingParams(max_tokens=12, frequency_penalty=1.5, min_p=0.02),
]
STOP = frozenset([7])


@cache
def pair() -> tuple[CausalLM, CausalLM]:
    """A random Llama, and the same with a little noise on its weights."""
    target = tiny.make("llama", tiny.GQA)
    draft = copy.deepcopy(target)
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return CausalLM(target), CausalLM(draft)


def outputs(make: Maker, rule=verify_tokens) -> list[list[int]]:
    requests = [Request(i, (5, 9, 8), replace(PARAMS[i % len(PARAMS)], seed=i), STOP) for i in range(8 * len(PARAMS))]
    return [row.output for row in sorted(make(uniforms, rule, 5).run(requests), key=lambda row: row.request.index)]


@cache
def right_outputs(rule) -> list[list[int]]:
    return outputs(maker(*pair(), 2), rule)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_changes_the_output(name: str) -> None:
    """All but M5, which only u = 0 shows; every row ends, a mutant that ignores `max_tokens` a draft later."""
    rule = verify_block if name.startswith("M12") else verify_tokens
    broken = outputs(MUTANTS[name](*pair(), 2), rule)
    assert (broken == right_outputs(rule)) == name.startswith("M5")
    assert all(1 <= len(output) <= 12 + 2 for output in broken)


def test_mutants_work_with_a_draft_head() -> None:
    target, _ = pair()
    head = new_head(target.model, torch.arange(0, 61, 2)).eval()
    makes = [plant(target, head, 2, proposer=EagleProposer) for plant in (maker, MUTANTS["M3 accept always"])]
    assert outputs(makes[0]) != outputs(makes[1])


# -- what each of the later mutants gets wrong ------------------------------------------------------------------

TARGET, DRAFT = grid_pair(12)
PROMPT = (1, 2)
QUARTERS = (4, 4, 4)


def enumerated(name: str, params: SamplingParams, grid: tuple[int, ...], rule=verify_tokens, gamma: int = 1) -> float:
    """Distance of a mutant's exact output distribution from plain decoding's, both by enumeration of the real loop."""
    distributions = [
        exact_distribution(plant(TARGET, DRAFT, gamma), PROMPT, 3, grid, params=params, rule=rule)
        for plant in (MUTANTS[name], maker)
    ]
    return distance(*distributions)


def test_penalties_once_per_step_are_wrong_after_the_first_draft_token() -> None:
    """Penalties lead off the grid of quarters, for both loops alike."""
    name = "M16 penalties once per step"
    assert enumerated(name, SamplingParams(), QUARTERS) == 0  # without penalties there is nothing to count
    assert enumerated(name, SamplingParams(presence_penalty=2.0), (6, 6, 6)) > 0.05


def test_parameters_on_the_bonus_only_leave_the_others_as_without_them() -> None:
    name = "M17 min-p and bias on the bonus only"
    assert enumerated(name, SamplingParams(), QUARTERS) == 0
    assert enumerated(name, SamplingParams(min_p=0.8), QUARTERS) > 0.1
    assert enumerated(name, SamplingParams(logit_bias={1: -100.0}), QUARTERS) > 0.1


def test_block_by_weight_is_lossy_with_one_hot_drafts_of_two_tokens() -> None:
    """With one draft token the last position is the only one, and its rule is right. On a grid of halves."""
    target, draft = (MarkovModel(table(seed, HALVES)) for seed in (2, 3))
    make, exact = MUTANTS["M18 block by weight, one-hot drafts"], joint_distribution(target, PROMPT, 4)
    for gamma, is_wrong in ((1, False), (2, True)):
        grid = (2,) * gamma + (4,) * gamma + (2,)
        broken = exact_distribution(make(target, draft, gamma), PROMPT, 4, grid, rule=verify_block)
        assert (distance(broken, exact) > 0.01) == is_wrong


def test_padding_is_accepted_only_beside_a_longer_draft() -> None:
    """Rows whose drafts differ in length: alone each is right, together they emit padding."""
    texts = [(1, 2, 0, 1, 2), (2, 1)] * 8
    requests = [Request(i, text, SamplingParams(max_tokens=6, seed=i)) for i, text in enumerate(texts)]

    def outputs_of(plant, batch_size: int) -> list[list[int]]:
        rows = plant(TARGET, DRAFT, 2)(uniforms, verify_tokens, batch_size).run(requests)
        return [row.output for row in sorted(rows, key=lambda row: row.request.index)]

    sound, broken = partial(maker, proposer=prompt_lookup), MUTANTS["M19 padding accepted"]
    assert outputs_of(broken, 1) == outputs_of(sound, 1) == outputs_of(sound, 16)
    assert outputs_of(broken, 16) != outputs_of(sound, 16)


@pytest.mark.parametrize("name", REPORT_MUTANTS)
def test_reports_are_wrong_and_outputs_right(name: str) -> None:
    """Counts are compared with the outputs, log-probabilities with those of the sound loop."""
    target, draft = pair()
    params = SamplingParams(max_tokens=10, logprobs=True)
    often = frozenset(range(0, 61, 3))
    requests = [Request(i, (5, 9, 8), replace(params, seed=i), often) for i in range(24)]

    def rows(plant) -> list:
        made = plant(target, draft, 4)(uniforms, verify_tokens, 5)
        return sorted(made.run(requests), key=lambda row: row.request.index)

    sound, broken = rows(maker), rows(REPORT_MUTANTS[name])
    assert [row.output for row in broken] == [row.output for row in sound]
    counted = [1 + sum(step.num_accepted + (step.last is not None) for step in row.steps) for row in broken]
    assert (counted == [len(row.output) for row in broken]) == (not name.startswith("M21"))
    assert ([row.logprobs for row in broken] == [row.logprobs for row in sound]) == name.startswith("M21")
