"""Gemma-3-270M, the second bundled model: another vocabulary than its draft's, and windows of 512 tokens."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from specdec import Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.models.files.bundled import GEMMA3_270M
from specdec.runtime import artifacts

NAME, DRAFT = GEMMA3_270M.name, "smollm2-135m"
WINDOW, MAX_TOKENS = 512, 8
PROMPT = "def fibonacci(n):\n    if n < 2:\n        return n\n    return"
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair():
    """Target and draft in float32. Running the tests accepts the terms, as documented."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(artifacts.ACCEPTED, NAME)
        options = {"dtype": torch.float32, "device": "cpu", "attention": "sdpa", "load_format": "auto"}
        target, drafts = load_with_drafts(NAME, [DRAFT], **options)
    return target, drafts[DRAFT]


def prompt_of(target, kind):
    """Token ids. The long prompt crosses the window while it is continued, where the context allows it."""
    tokens = target.tokenizer(PROMPT).input_ids
    length = min(target.context_length, WINDOW + MAX_TOKENS // 2) - MAX_TOKENS
    return (tokens * length)[:length] if kind == "long" else tokens


@pytest.fixture(scope="module")
def expected(pair):
    """The output of `transformers.generate` for each prompt."""
    target, _ = pair

    @cache
    def generate(kind):
        prompt = torch.tensor([prompt_of(target, kind)])
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": MAX_TOKENS}
        return target.model.generate(prompt, **options)[0, prompt.shape[1] :].tolist()

    return generate


def test_the_model_has_the_sizes_in_its_file(pair):
    target, _ = pair
    config = target.model.config
    assert (target.vocab_size, config.sliding_window, config.max_position_embeddings) == (262_144, WINDOW, 32_768)
    assert (target.num_layers, config.hidden_size, config.layer_types.count("full_attention")) == (18, 640, 3)
    assert target.context_length >= WINDOW
    text = "  Speculative décoding:\n\n1234 + 56 = 1290 🙂"
    assert target.tokenizer.decode(target.tokenizer(text).input_ids, skip_special_tokens=True) == text


SHORT = [("short", method) for method in ("autoregressive", "ngram", "suffix", "draft_model", "hybrid")]


@pytest.mark.parametrize(("kind", "method"), [*SHORT, ("long", "ngram"), ("long", "draft_model")])
def test_greedy_equals_transformers(kind, method, pair, expected):
    target, draft = pair
    options = {"draft": draft} if method in ("draft_model", "hybrid") else {}
    engine = Engine(target, method=method, num_speculative_tokens=3, **options)
    (completion,) = engine.generate([prompt_of(target, kind)], GREEDY)
    assert list(completion.token_ids) == expected(kind)
    if method == "draft_model":
        assert completion.counts.num_accepted > 0  # the vocabularies share the tokens of this text
