"""Mixtures of experts: what a step reads depends on its tokens, and costs are measured with tokens that differ."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bench.measure.cost.sweep import _step
from specdec.models import costs
from specdec.models.causal import CausalLM
from specdec.models.costs import sample_tokens, target_costs
from specdec.models.experts import ExpertReads, count_reads

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "num_experts_per_tok": 2}


@pytest.fixture(params=["mixtral", "qwen3-moe"])
def target(request):
    """Two layers of 8 experts, each of 3 * 32 * 16 weights, two of which a token reads."""
    torch.manual_seed(0)
    if request.param == "mixtral":
        config = MixtralConfig(**SIZES, intermediate_size=32, num_local_experts=8)
        return CausalLM(MixtralForCausalLM(config).eval())
    config = Qwen3MoeConfig(**SIZES, intermediate_size=32, moe_intermediate_size=32, num_experts=8)
    return CausalLM(Qwen3MoeForCausalLM(config).eval())


def reads(target, tokens):
    cache = target.allocate(len(tokens), 32)
    return count_reads(target.model, lambda: target.forward(torch.tensor(tokens), cache))


def test_one_token_reads_its_experts_in_each_layer(target):
    expert_bytes = 3 * 32 * 16 * 4
    assert reads(target, [[5]]) == ExpertReads(4, 16, 4 * expert_bytes, 16 * expert_bytes)


def test_more_tokens_read_what_their_router_selects(target):
    """Against the routers' own scores, layer by layer."""
    tokens, selected = [[5, 9, 33, 60]], []
    routers = [module for name, module in target.model.named_modules() if name.endswith("mlp.gate")]
    assert len(routers) == 2
    hooks = [router.register_forward_hook(lambda *call: selected.append(call[-1])) for router in routers]
    found = reads(target, tokens)
    for hook in hooks:
        hook.remove()
    logits = [each if isinstance(each, torch.Tensor) else each[0] for each in selected]
    expected = sum(each.topk(2, -1).indices.unique().numel() for each in logits)
    assert found.num_read == expected > 4
    assert found.bytes_read == expected * 3 * 32 * 16 * 4


def test_a_dense_model_has_none():
    config = LlamaConfig(**SIZES, intermediate_size=32)
    model = CausalLM(LlamaForCausalLM(config).eval())
    assert reads(model, [[1, 2]]) is None


def test_costs_are_measured_with_tokens_that_are_routed_apart(target, monkeypatch):
    """The widths that are timed read more and more experts, and rows do not repeat each other."""
    found = {}

    def count(run, device, **_):
        read = count_reads(target.model, run)
        found[len(found) + 1] = read.num_read
        return [1.0]

    monkeypatch.setattr(costs, "durations_s", count)
    target_costs(target, 1, records=False)
    assert found[1] == 4
    assert found[9] > found[3] > found[1]
    one_row = dict(found)
    found.clear()
    target_costs(target, 4, records=False)
    assert found[1] > one_row[1]


def test_the_roofline_counts_the_experts_that_are_read(target):
    """bytes_read grows with the width of the step, and stays below all weights."""
    steps = [_step(target, 1, width, 8) for width in (1, 5)]
    expert_bytes = 3 * 32 * 16 * 4
    for width, step in zip((1, 5), steps, strict=True):
        facts = step.facts()
        unread = facts["num_experts"] - facts["experts_read"]
        assert facts["num_experts"] == 16
        assert step.bytes_read == target.step_bytes - unread * expert_bytes + (8 + width) * target.token_bytes
        step.run()
    assert steps[0].facts()["experts_read"] == 4 < steps[1].facts()["experts_read"]


def test_the_sample_is_a_text_for_a_target_with_a_tokenizer():
    class Tokenizer:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return type("Encoded", (), {"input_ids": list(text.encode()[:50])})

    model = type("Target", (), {"tokenizer": Tokenizer(), "vocab_size": 256})
    rows = sample_tokens(model, 3, 30)
    assert [len(row) for row in rows] == [30, 30, 30]
    assert [*rows[0], *rows[1][:20]] == list(costs.SAMPLE.encode()[:50])
    assert rows[0] != rows[1] != rows[2]
