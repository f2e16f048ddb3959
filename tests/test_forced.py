"""Forced acceptance patterns: steps accept as listed, and the token after the draft is still the target's own."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers import tiny

from specdec import Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.models.causal import CausalLM

PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4, 11, 4, 11]]


@cache
def pair() -> tuple[CausalLM, CausalLM]:
    """A random Llama in float64, and the same with noise on its weights, which it accepts now and then."""
    target = tiny.make("llama", tiny.GQA, torch.float64)
    draft = copy.deepcopy(target)
    for parameter in draft.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return CausalLM(target), CausalLM(draft)


def generate(sampling: SamplingParams, prompts: Any = PROMPTS, **options: Any) -> list:
    target, draft = pair()
    if options.get("method") == "draft_model":
        options["draft"] = draft
    return Engine(target, num_speculative_tokens=3, max_batch_size=2, **options).generate(prompts, sampling)


@pytest.mark.parametrize("method", ["draft_model", "ngram", "suffix", "early_exit"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(max_tokens=24, temperature=0),
        SamplingParams(max_tokens=24, seed=3),
        SamplingParams(max_tokens=24, top_k=5, repetition_penalty=1.3, seed=4),
    ],
    ids=["greedy", "T = 1", "top-k and penalty"],
)
def test_accepting_none_is_plain_decoding_token_for_token(method: str, sampling: SamplingParams) -> None:
    forced = generate(sampling, method=method, forced_acceptance="none")
    plain = generate(sampling, verification="coupled")
    assert [each.token_ids for each in forced] == [each.token_ids for each in plain]
    if method in ("draft_model", "early_exit"):  # a copier may find nothing to copy
        assert sum(each.counts.num_drafted for each in forced) > 0
    assert sum(each.counts.num_accepted for each in forced) == 0


@pytest.mark.parametrize(
    ("forced", "expected"),
    [("all", [3, 3, 3, 3]), ("none", [0, 0, 0, 0]), ("alternating", [3, 0, 3, 0]), ([2, 0, 1, 9], [2, 0, 1, 3])],
    ids=str,
)
def test_steps_accept_by_the_pattern(forced: Any, expected: list[int]) -> None:
    """Each row on its own: the third prompt enters a slot while the other row is in the middle of its pattern."""
    sampling = [SamplingParams(max_tokens=each, seed=each, ignore_eos=True) for each in (40, 31, 34)]
    for completion in generate(sampling, method="draft_model", forced_acceptance=forced):
        full = [step.num_accepted for step in completion.steps if step.num_drafted == 3][:4]
        assert full == expected[: len(full)]
        assert len(full) == 4


def test_a_step_with_fewer_draft_tokens_accepts_them_all() -> None:
    """The last step drafts no more than may be emitted before the token after the draft."""
    (completion,) = generate(SamplingParams(max_tokens=7), PROMPTS[:1], method="draft_model", forced_acceptance="all")
    assert [(step.num_drafted, step.num_accepted) for step in completion.steps] == [(3, 3), (1, 1)]


def test_the_token_after_the_draft_is_the_target_s_own() -> None:
    """By a target that is certain of its next token: whatever was accepted, the one after it follows the target."""
    _, draft = grid_pair(5)
    certain = type(draft)(torch.eye(3).double().roll(1, 1).expand(3, 3, 3))  # token t is followed by t + 1
    engine = Engine(certain, method="draft_model", draft=draft, num_speculative_tokens=2, forced_acceptance=(1, 2, 0))
    (completion,) = engine.generate([[0, 1]], SamplingParams(max_tokens=60, seed=1))
    tokens, place, wrong = (0, 1, *completion.token_ids), 3, 0
    for step in completion.steps:
        place += step.num_accepted
        if place < len(tokens) and step.last:
            assert tokens[place] == (tokens[place - 1] + 1) % 3
        wrong += sum(tokens[i] != (tokens[i - 1] + 1) % 3 for i in range(place - step.num_accepted, place))
        place += 1
    assert wrong > 5  # accepted although the target excludes them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"forced_acceptance": "some"},
            "forced_acceptance='some' must be 'all', 'none', 'alternating', or the",
        ),
        ({"forced_acceptance": []}, r"forced_acceptance=\[\] must be"),
        ({"forced_acceptance": [1, -1]}, r"forced_acceptance=\[1, -1\] must be"),
        ({"forced_acceptance": [1.0]}, r"forced_acceptance=\[1.0\] must be"),
        ({"forced_acceptance": [True]}, r"forced_acceptance=\[True\] must be"),
        (
            {"forced_acceptance": "all", "synthetic_acceptance_rates": [0.5]},
            "synthetic_acceptance_rates must be omitted with forced_acceptance",
        ),
        ({"forced_acceptance": "all", "verification": "block"}, "verification='block' must be omitted with forced"),
        ({"forced_acceptance": "all", "records": True}, "records must be omitted with forced_acceptance"),
    ],
    ids=str,
)
def test_what_a_pattern_does_not_go_with_is_refused(options: dict, message: str) -> None:
    target, _ = pair()
    with pytest.raises(ValueError, match=message):
        Engine(target, method="ngram", **options)


def test_trees_and_constraints_are_refused() -> None:
    target, draft = pair()
    with pytest.raises(ValueError, match='forced_acceptance must be omitted with method="tree"'):
        Engine(target, method="tree", draft=draft, forced_acceptance="all")
    engine = Engine(target, method="ngram", forced_acceptance="all")
    with pytest.raises(ValueError, match="min_tokens must be omitted with forced_acceptance, which accepts any token"):
        engine.generate([[1, 2]], SamplingParams(max_tokens=8, min_tokens=2))


def test_an_engine_shows_its_pattern() -> None:
    target, _ = pair()
    assert "forced_acceptance='none'" in repr(Engine(target, method="ngram", forced_acceptance="none"))
    assert "synthetic_acceptance_rates=[0.5]" in repr(Engine(target, method="ngram", synthetic_acceptance_rates=[0.5]))
