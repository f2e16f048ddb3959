"""Mutants in a decoder of a real architecture: each does something, and runs to the end."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import tiny

from specdec import SamplingParams
from specdec.conformance.mutants import MUTANTS, Maker, maker
from specdec.heads.eagle import new_head
from specdec.models.causal import CausalLM
from specdec.proposers.heads.eagle import EagleProposer
from specdec.requests import Request
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_block, verify_tokens

PARAMS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, top_k=3),
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(max_tokens=12, logit_bias={7: 6.0, 8: 6.0}),
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
