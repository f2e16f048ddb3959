"""Log-probabilities of emitted tokens equal those of a plain scoring pass, whatever the token's source."""

from __future__ import annotations

import pytest
import torch
from helpers.drafts import HEAD_METHODS
from test_engine import PROMPTS, TARGET, engine_for

from specdec import METHODS, Completion, Engine, SamplingParams

PROCESSED = {"temperature": 0.7, "top_k": 2, "frequency_penalty": 0.4, "logit_bias": {1: 0.5}}


RULES = [(method, rule) for method in METHODS if method not in HEAD_METHODS for rule in ("token", "block", "coupled")]


@pytest.mark.parametrize(("method", "verification"), [rule for rule in RULES if rule != ("tree", "block")])
def test_logprobs_are_those_of_the_unprocessed_table(method: str, verification: str) -> None:
    """For accepted, recovered and bonus tokens, in rows that accept different numbers of tokens."""
    params = [SamplingParams(max_tokens=9 + i, logprobs=True, seed=i, **PROCESSED) for i in range(5)]
    completions = engine_for(method, max_batch_size=3, verification=verification).generate(PROMPTS, params)
    for completion in completions:
        tokens = [0, *completion.prompt_token_ids, *completion.token_ids]
        start = len(tokens) - len(completion.token_ids)
        expected = [
            TARGET.table[tokens[i - 2], tokens[i - 1], tokens[i]].log().item() for i in range(start, len(tokens))
        ]
        assert completion.logprobs == pytest.approx(expected, abs=1e-12)
        assert completion.top_logprobs is None
    sources = {source for completion in completions for source in completion.sources}
    assert method == "autoregressive" or sources == {"accepted", "recovered", "bonus", "plain"}


def test_top_logprobs_are_returned_on_request() -> None:
    """The most probable tokens of each position in order; asking for more than there are returns all."""
    for num_top in (1, 2, 9):
        params = SamplingParams(max_tokens=8, logprobs=True, top_logprobs=num_top, seed=1)
        (completion,) = engine_for("draft_model").generate([[0, 1]], params)
        tokens = [0, 1, *completion.token_ids]
        assert len(completion.top_logprobs) == 8
        for i, likeliest in enumerate(completion.top_logprobs):
            distribution = TARGET.table[tokens[i], tokens[i + 1]].log().tolist()
            assert list(likeliest.values()) == pytest.approx(sorted(distribution, reverse=True)[:num_top], abs=1e-12)
            assert likeliest == pytest.approx({token: distribution[token] for token in likeliest}, abs=1e-12)


def test_top_logprobs_need_logprobs() -> None:
    with pytest.raises(ValueError, match="top_logprobs=2 must be 0 without logprobs; set logprobs=True"):
        SamplingParams(top_logprobs=2)
    with pytest.raises(ValueError, match="top_logprobs=-1 must be an integer >= 0"):
        SamplingParams(top_logprobs=-1, logprobs=True)


def scored(target, completion: Completion) -> torch.Tensor:
    """Log-probabilities of a completion from one uncached forward pass over it."""
    tokens = torch.tensor([completion.prompt_token_ids + completion.token_ids])
    logits = target.model(input_ids=tokens, use_cache=False).logits[0, len(completion.prompt_token_ids) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("method", ["ngram", "eagle", "draft_model", "hybrid"])
def test_logprobs_on_the_real_model_equal_a_scoring_pass(method: str, default_pair: tuple, default_model) -> None:
    """In float32 against transformers' own forward pass; differences are rounding."""
    target, drafts = default_pair
    prompts = [target.tokenizer(text).input_ids for text in ("One, two, three, one, two, three, one,", "The sea is")]
    params = [SamplingParams(max_tokens=8, logprobs=True, top_logprobs=3, temperature=t, seed=3) for t in (0, 0.8)]
    options = {"draft": drafts.get(method), "num_speculative_tokens": 3, "max_batch_size": 2}
    completions = Engine(target, method=method, **options).generate(prompts, params)
    for completion in completions:
        with torch.inference_mode():
            expected = scored(default_model, completion)
        at_tokens = expected.gather(1, torch.tensor(completion.token_ids).unsqueeze(1)).squeeze(1).tolist()
        assert completion.logprobs == pytest.approx(at_tokens, abs=2e-4)
        top = expected.topk(3).values.tolist()
        assert [list(each.values()) for each in completion.top_logprobs] == [
            pytest.approx(each, abs=2e-4) for each in top
        ]
    assert "accepted" in {source for completion in completions for source in completion.sources}
