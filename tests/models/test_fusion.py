"""Fused layers against the transformers layers that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny
from helpers.live_bytes import LiveBytes
from helpers.tiny import GQA, GREEDY, PROMPTS, SUPPORTED, reference

from specdec import Engine
from specdec.kernels import cpp
from specdec.models.causal import CausalLM
from specdec.models.fusion import FusedLayer, fuse, weight_bytes

WIDE = GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # shapes that the kernels take
CAPPED = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
LOCAL_AND_GLOBAL = {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24}
KERNEL_KINDS = {
    "llama 32": WIDE,
    "mistral 64": WIDE | {"head_dim": 64, "sliding_window": None},
    "qwen2 32": WIDE,
    "qwen3 96": WIDE | {"head_dim": 96},
    "llama 128 with biases": WIDE | {"head_dim": 128, "attention_bias": True, "mlp_bias": True},
    "llama 32 without groups": WIDE | {"num_key_value_heads": 4},
    "gemma 256": WIDE | {"head_dim": 256, "num_key_value_heads": 1},
    "gemma2 32": WIDE | CAPPED,
    "gemma3_text 256": WIDE | {"head_dim": 256, "num_key_value_heads": 1} | LOCAL_AND_GLOBAL,
    "granite 32": WIDE | {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "phi3 32": WIDE,
}
KINDS = {kind: SUPPORTED[kind] for kind in ("llama", "mistral", "qwen2", "qwen3")} | {
    "llama with biases": GQA | {"attention_bias": True},
    "llama without groups": GQA | {"num_key_value_heads": 4},
    "qwen2 gelu": GQA | {"hidden_act": "gelu"},
    "gemma": GQA,
    "gemma2": GQA | CAPPED,
    "gemma3_text": GQA | LOCAL_AND_GLOBAL,
    "granite": GQA | {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "phi3": GQA,
}


def make(kind: str, options: dict, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose norms are no longer all alike, with the attention that its architecture supports."""
    model = tiny.make(kind, options, dtype, "eager" if kind == "gemma2" else "sdpa")
    for norm in (module.weight for module in model.modules() if type(module).__name__.endswith("RMSNorm")):
        norm.data += torch.randn(norm.shape).mul(0.3).to(dtype)
    return model


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_but_the_embedding(tied: bool) -> None:
    """Fused or not; a tied embedding is the head's weight, and read as such."""
    model = make("llama", WIDE | {"vocab_size": 64, "tie_word_embeddings": tied}, torch.bfloat16)
    embedding, num_weights = 64 * 64, sum(weight.numel() for weight in model.parameters())
    expected = 2 * (num_weights if tied else num_weights - embedding)
    assert CausalLM(model).step_bytes == expected
    fuse(model)
    assert CausalLM(model).step_bytes == expected


needs_kernels = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)


@pytest.mark.parametrize("with_kernels", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_layers_through_the_cache_are_those_of_the_original(
    kind: str, dtype: torch.dtype, with_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 as near to the float32 model as transformers' own layers are."""
    if not with_kernels:
        monkeypatch.setattr(cpp, "available", lambda dtype: False)
    name, options = kind.split()[0], KERNEL_KINDS[kind]
    exact, plain, fused = (make(name, options, each) for each in (torch.float32, dtype, dtype))
    fuse(fused)
    assert all((layer.kernel is not None) == with_kernels for layer in fused.model.layers)
    tokens = torch.tensor([[5, 9, 8, 7, 5, 9, 8, 3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]])
    lm = CausalLM(fused)
    with torch.inference_mode():
        exact.to(dtype).float()
        expected = exact(tokens, use_cache=False).logits
        error, own = (
            float((logits.float() - expected).norm() / expected.norm())
            for logits in (plain(tokens, use_cache=False).logits, lm.forward(tokens, lm.allocate(1, 20)))
        )
    assert own < (1e-5 if dtype == torch.float32 else 1.5 * error)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KERNEL_KINDS)
def test_with_kernels_a_token_does_not_depend_on_its_neighbours(kind: str, dtype: torch.dtype) -> None:
    """The same bits however many tokens a call has, whatever the rows beside it hold."""
    model = make(kind.split()[0], KERNEL_KINDS[kind], dtype)
    fuse(model)
    lm = CausalLM(model)
    torch.manual_seed(1)
    tokens = torch.randint(3, 61, (3, 40))
    alone = lm.forward(tokens[:1], lm.allocate(1, 40))
    for width in (1, 2, 3, 5, 9, 13, 29):
        cache, pieces = lm.allocate(3, 60), []
        cache.num_cached[:] = [0, 7, 11]
        for start in range(0, 40, width):
            pieces.append(lm.forward(tokens[:, start : start + width], cache))
            cache.num_cached[:] = [length + pieces[-1].shape[1] for length in cache.num_cached]
        assert torch.equal(torch.cat(pieces, 1)[:1], alone)


LONG = 700  # tokens: beyond the blocks of 512 keys that a kernel may take at once
HEADS = {f"head of {size}": WIDE | {"head_dim": size, "max_position_embeddings": 1024} for size in cpp.HEAD_DIMS}


def calm(options: dict, dtype: torch.dtype) -> torch.nn.Module:
    """A model whose weights do not amplify roundings over a long context."""
    model = tiny.make("llama", options, dtype)
    for weight in model.parameters():
        weight.data *= 0.5 if weight.ndim > 1 else 1
    return model


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_kernels_over_long_contexts_are_the_original_layers(name: str, dtype: torch.dtype) -> None:
    """Of every head size, as one prefill and as steps of 1, 3 and 9 tokens after it; log-probabilities by position.

    In bf16 errors are transformers' own; a query that does not see itself from position 512 on would be seen.
    """
    exact, plain, fused = (calm(HEADS[name], each) for each in (torch.float32, dtype, dtype))
    fuse(fused)
    assert all(layer.kernel is not None for layer in fused.model.layers)
    tokens = torch.randint(3, 61, (1, LONG), generator=torch.Generator().manual_seed(2))
    for weight in exact.parameters():  # not its buffers: rotary frequencies are float32 in every model
        weight.data = weight.data.to(dtype).float()
    lm = CausalLM(fused)
    with torch.inference_mode():
        expected, own = (model(tokens, use_cache=False).logits.double().log_softmax(-1) for model in (exact, plain))
        seen = torch.ones(1, 1, LONG, LONG).tril().bool()
        seen[..., range(512, LONG), range(512, LONG)] = False
        blind = exact(tokens, use_cache=False, attention_mask=seen).logits.double().log_softmax(-1)
        whole = lm.forward(tokens, lm.allocate(1, LONG))
        cache, start = lm.allocate(1, LONG), 500
        pieces = [lm.forward(tokens[:, :start], cache)]
        while start < LONG:
            cache.num_cached[:] = [start]
            pieces.append(lm.forward(tokens[:, start : start + (1, 3, 9)[start % 3]], cache))
            start += pieces[-1].shape[1]
    assert torch.equal(torch.cat(pieces, 1), whole)
    errors = ((each - expected).abs().amax(-1)[0, 512:] for each in (whole.double().log_softmax(-1), own, blind))
    away, usual, without_itself = (each.mean() for each in errors)
    bound = 1e-5 if dtype == torch.float32 else 1.1 * usual
    assert away < bound < without_itself


@needs_kernels
def test_with_kernels_speculation_is_bit_identical_to_plain_decoding() -> None:
    """In bf16, where other engines differ at near ties."""
    model = tiny.make("llama", KERNEL_KINDS["llama 32"], torch.bfloat16)
    fuse(model)
    plain = Engine(CausalLM(model)).generate(PROMPTS, GREEDY)
    drafted = Engine(CausalLM(model), method="ngram", num_speculative_tokens=5, max_batch_size=3)
    completions = drafted.generate(PROMPTS, GREEDY)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert sum(c.counts.num_drafted for c in completions) > 5


def test_fusing_needs_little_more_memory_than_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is joined is copied, so a layer's old weights must go before the next layer's are joined."""
    monkeypatch.setattr(cpp, "available", lambda dtype: False)
    model = make("llama", WIDE | {"num_hidden_layers": 16})
    num_bytes = weight_bytes(model.modules())
    with LiveBytes(list(model.parameters())) as live:
        fuse(model)
    assert live.peak <= 1.1 * num_bytes
    assert live.now <= 1.01 * num_bytes


def test_other_activations_are_left_to_torch() -> None:
    model = make("llama", WIDE | {"hidden_act": "gelu"})
    fuse(model)
    assert isinstance(model.model.layers[0], FusedLayer)
    assert model.model.layers[0].kernel is None


def test_other_architectures_keep_their_layers() -> None:
    model = make("gpt2", SUPPORTED["gpt2"])
    assert fuse(model) == 1  # the head
    expected = [reference(make("gpt2", SUPPORTED["gpt2"]), prompt) for prompt in PROMPTS]
    completions = Engine(CausalLM(model), max_batch_size=2).generate(PROMPTS, GREEDY)
    assert [list(c.token_ids) for c in completions] == expected
