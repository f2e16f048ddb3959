"""Acceptance statistics of transformers, which itself returns none, and equal terms with specdec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator, PromptLookupCandidateGenerator

from bench.catalogue.pairs import Pair, catalogue
from bench.engines.base import BenchEngine, LoadOptions, Run
from bench.engines.registry import load
from bench.engines.transformers import Observer
from bench.measure.paired import check_counts
from specdec import SamplingParams

PROMPT = tuple(b"abc abc abc abc ab")
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module", params=["tiny-random", "tiny-t5-random"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Decoder-only, and an encoder-decoder."""
    return catalogue()[request.param]


@pytest.fixture(scope="module")
def engine(pair: Pair) -> BenchEngine:
    """A tiny random model whose draft is another instance of itself."""
    return load("transformers", pair, LoadOptions("float32", "cpu"))


@pytest.fixture(scope="module")
def own(pair: Pair) -> BenchEngine:
    """specdec with the same weights."""
    return load("specdec", pair, LoadOptions("float32", "cpu"))


@pytest.fixture(scope="module")
def reference(own: BenchEngine) -> Run:
    """The output of specdec with the same weights."""
    return own.generate([PROMPT], "autoregressive", 0, [GREEDY])


@pytest.mark.parametrize(("method", "gamma"), [("autoregressive", 0), ("ngram", 3), ("draft_model", 3)])
def test_greedy_outputs_are_those_of_specdec(engine: BenchEngine, reference: Run, method: str, gamma: int) -> None:
    run = engine.generate([PROMPT], method, gamma, [GREEDY])
    assert run.results[0].token_ids == reference.results[0].token_ids
    assert run.results[0].finish_reason == reference.results[0].finish_reason
    check_counts([run], method, GREEDY.max_tokens)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculative_outputs_of_specdec_are_its_plain_ones(own: BenchEngine, reference: Run, method: str) -> None:
    """In a batch of two, as the harness calls it; the draft is the target itself."""
    run = own.generate([PROMPT, PROMPT[:5]], method, 3, [GREEDY, GREEDY])
    assert run.results[0].token_ids == reference.results[0].token_ids
    counts = run.results[0].counts
    assert counts is not None
    assert method == "ngram" or counts.acceptance_rate == 1


def test_a_model_that_assists_itself_is_always_accepted(engine: BenchEngine) -> None:
    (result,) = engine.generate([PROMPT], "draft_model", 3, [GREEDY]).results
    assert result.counts is not None
    assert result.counts.acceptance_rate == 1
    # 24 tokens, four at each call: the first call has a draft too, and so is a step
    assert (result.counts.num_steps, result.counts.num_drafted, result.counts.num_emitted) == (6, 18, 24)
    assert result.counts.accepted_at == [6, 6, 6]


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_counters_add_up_when_sampling(engine: BenchEngine, method: str) -> None:
    for seed in range(5):
        sampling = SamplingParams(temperature=1, top_p=0.9, max_tokens=16, seed=seed)
        check_counts([engine.generate([PROMPT], method, 2, [sampling])], method, 16)


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_counters_agree_with_transformers_candidate_generator(
    engine: BenchEngine, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[tuple[int, int]] = []
    kind = PromptLookupCandidateGenerator if method == "ngram" else AssistedCandidateGenerator
    monkeypatch.setattr(
        kind,
        "update_candidate_strategy",
        lambda self, tokens, scores, num_matches: updates.append((scores.shape[1] - 1, int(num_matches))),
    )
    sampling = SamplingParams(temperature=1, top_p=0.9, max_tokens=24, ignore_eos=True)
    (result,) = engine.generate([PROMPT], method, 2, [sampling]).results
    assert result.counts is not None
    assert (result.counts.num_drafted, result.counts.num_accepted) == tuple(map(sum, zip(*updates, strict=True)))


def test_generation_configs_are_put_back_as_found(engine: Any) -> None:
    found = [(model.generation_config, model.generation_config.to_dict()) for model in (engine._target, engine._draft)]
    engine.generate([PROMPT], "draft_model", 2, [GREEDY])
    for model, (config, values) in zip((engine._target, engine._draft), found, strict=True):
        assert model.generation_config is config
        assert config.to_dict() == values
        assert not model._forward_pre_hooks


class Recorded(torch.nn.Module):
    """Stands for a model in a `generate` call with prescribed steps."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids


def test_a_known_course_of_calls_gives_its_counts() -> None:
    model, prompt = Recorded(), [7, 7, 7]
    calls = [
        (prompt, [1]),  # the prefill has no draft: not a step
        ([1, 5, 6, 8], [5, 6, 9]),  # two accepted, one recovered
        ([9], [4]),  # nothing to propose
        ([4, 2, 3], [2, 3, 1]),  # all accepted, and a bonus token
        ([1, 4, 0, 4], [4, 0]),  # token 0 ends it: the last accepted token is the last one emitted
    ]
    with Observer(model, len(prompt)) as observer:
        observer.put(torch.tensor([prompt]))
        for fed, emitted in calls:
            model(input_ids=torch.tensor([fed]))
            observer.put(torch.tensor([emitted]))
    assert observer.emitted == [1, 5, 6, 9, 4, 2, 3, 1, 4, 0]
    counts = observer.counts
    assert (counts.num_steps, counts.num_drafted, counts.num_accepted, counts.num_emitted) == (4, 8, 6, 9)
    assert counts.accepted_at == [3, 3, 0]


def test_a_draft_that_goes_with_the_prompt_makes_it_a_step() -> None:
    model = Recorded()
    with Observer(model, 2) as observer:
        observer.put(torch.tensor([[7, 7]]))
        model(input_ids=torch.tensor([[7, 7, 1, 2]]))
        observer.put(torch.tensor([[1, 3]]))
    assert (observer.counts.num_steps, observer.counts.num_accepted, observer.counts.num_emitted) == (1, 1, 2)
