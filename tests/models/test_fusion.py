"""Fused layers against the transformers layers that they replace."""

from __future__ import annotations

import pytest
import torch
from tiny import GQA, GREEDY, PROMPTS, SUPPORTED, make, reference

from specdec import Engine
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse

KINDS = {kind: SUPPORTED[kind] for kind in ("llama", "mistral", "qwen2", "qwen3")} | {
    "llama with biases": GQA | {"attention_bias": True},
    "llama without groups": GQA | {"num_key_value_heads": 4},
    "qwen2 gelu": GQA | {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_original_layers(kind: str, dtype: torch.dtype) -> None:
    plain, fused = (make(kind.split()[0], KINDS[kind], dtype) for _ in range(2))
    assert fuse(fused) == 3  # two layers and the head
    tokens = torch.tensor([[5, 9, 8, 7, 5, 9, 8], [3, 1, 4, 1, 5, 9, 2]])
    with torch.inference_mode():
        expected, actual = (model(tokens, use_cache=False).logits.float() for model in (plain, fused))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert (actual - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_original_layers(kind: str) -> None:
    """Through the ragged cache, three slots for four prompts, n-gram drafts, float32."""
    model = make(kind.split()[0], KINDS[kind])
    expected = [reference(model, prompt) for prompt in PROMPTS]
    fuse(model)
    for method in ("autoregressive", "ngram"):
        completions = Engine(CausalLM(model), method=method, max_batch_size=3).generate(PROMPTS, GREEDY)
        assert [list(c.token_ids) for c in completions] == expected


def test_other_architectures_keep_their_layers() -> None:
    model = make("gpt2", SUPPORTED["gpt2"])
    assert fuse(model) == 1  # the head
    expected = [reference(make("gpt2", SUPPORTED["gpt2"]), prompt) for prompt in PROMPTS]
    completions = Engine(CausalLM(model), max_batch_size=2).generate(PROMPTS, GREEDY)
    assert [list(c.token_ids) for c in completions] == expected
