"""Transformers models through the ragged cache: equal to plain `generate`, or refused."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers.tiny import GQA, GREEDY, PROMPTS, SMALL, SUPPORTED, make, reference

from specdec import Engine, SamplingParams
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.trial import check_logits, rounding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_ragged_batches_equal_plain_forwards(kind: str, attention: str) -> None:
    """Four prompts of unequal length in three slots, plain and with n-gram drafts, float32."""
    if kind in ("gpt_neo", "mpt") and attention == "sdpa":
        pytest.skip("transformers has no SDPA for this architecture; its eager attention is tested")
    model = make(kind, SUPPORTED[kind], attention=attention)
    expected = [reference(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1
    target = CausalLM(model)
    for method in ("autoregressive", "ngram"):
        engine = Engine(target, method=method, max_batch_size=3)
        assert [list(c.token_ids) for c in engine.generate(PROMPTS, GREEDY)] == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_runs_through_the_same_path(attention: str) -> None:
    """In bf16 rounding may flip near ties, so one step's distribution is compared, within bf16's precision."""
    model = make("llama", GQA, torch.bfloat16, attention)
    target = CausalLM(model)
    cache = target.allocate(2, 32)
    cache.num_cached[:] = [0, 0]
    target.forward(torch.tensor([[5, 9, 8, 7]] * 2), cache)
    cache.num_cached[:] = [2, 4]
    logits = target.forward(torch.tensor([[8, 7, 3], [3, 1, 1]]), cache)
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([[5, 9, 8, 7, 3]]), use_cache=False).logits[0, -1].float()
    for row in (logits[0, 2], logits[1, 0]):
        assert (row.float() - plain).norm() / plain.norm() < 0.02


REFUSED = {
    "xlnet": (
        {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        "XLNetLMHeadModel keeps no keys and values between calls",
    ),
    "xlm": (
        {"vocab_size": 61, "emb_dim": 32, "n_layers": 2, "n_heads": 4},
        "XLMWithLMHeadModel keeps no keys and values between calls",
    ),
    "cpmant": (
        SMALL | {"dim_head": 8, "dim_ff": 48},
        "CpmAntForCausalLM does not support the per-row .* and cache of ragged batches .its CpmAntAttention raised",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_would_be_decoded_wrongly_are_refused(kind: str) -> None:
    options, message = REFUSED[kind]
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        CausalLM(make(kind, options, attention="eager"))
    assert "sizes" not in str(refusal.value), "torch's words for what went wrong inside tell nobody what to do"


def test_encoder_decoders_are_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, vocab_size=61))
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
        CausalLM(model)


def test_other_attention_implementations_are_refused() -> None:
    model = make("llama", GQA)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"attention='flex_attention' of .* must be 'eager' or 'sdpa'"):
        CausalLM(model)


def test_a_sliding_window_does_not_bound_the_context() -> None:
    model = make("mistral", GQA | {"sliding_window": 16})
    target = CausalLM(model)
    assert (target.context_length, target.context_name) == (64, "max_position_embeddings")
    beyond = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert list(Engine(target, method="ngram").generate([PROMPTS[2]], beyond)[0].token_ids) == reference(
        model, PROMPTS[2]
    )


@pytest.mark.parametrize(("kind", "name"), [("mpt", "max_seq_len"), ("gpt2", "n_positions|max_position_embeddings")])
def test_the_context_is_known_by_the_name_that_the_config_has(kind: str, name: str) -> None:
    target = CausalLM(make(kind, SUPPORTED[kind], attention="eager"))
    assert target.context_length == 64
    with pytest.raises(
        ValueError, match=rf"prompt 0 has 60 tokens, which with max_tokens=12 exceeds the ({name}) of 64"
    ):
        Engine(target).generate([[1] * 60], GREEDY)


def test_a_call_beyond_the_capacity_is_refused() -> None:
    target = CausalLM(make("llama", GQA))
    with pytest.raises(ValueError, match="0 cached tokens and 5 more exceed the cache's capacity of 4"):
        target.forward(torch.ones(1, 5, dtype=torch.int64), target.allocate(1, 4))


def test_prefill_in_chunks_equals_prefill_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target = CausalLM(make("llama", GQA))
    whole = Engine(target).generate(PROMPTS, GREEDY)
    monkeypatch.setattr("specdec.models.base.PREFILL_CHUNK", 3)
    assert [c.token_ids for c in Engine(target).generate(PROMPTS, GREEDY)] == [c.token_ids for c in whole]


@pytest.mark.parametrize(
    ("dtype", "num_layers", "difference", "is_sound"),
    [
        (torch.bfloat16, 32, 0.06, True),  # as 8B parameters at random differed on an H100, by rounding alone
        (torch.bfloat16, 16, 0.06, False),
        (torch.bfloat16, 32, 0.15, False),
        (torch.float32, 32, 0.002, False),
    ],
)
def test_deep_models_of_16_bits_may_differ_by_more_rounding(
    dtype: torch.dtype, num_layers: int, difference: float, is_sound: bool
) -> None:
    expected = torch.zeros(3, 100, dtype=dtype)
    expected[:, 0] = 1
    actual = expected.clone()
    actual[:, 1] = difference
    with (
        nullcontext()
        if is_sound
        else pytest.raises(UnsupportedModelError, match=r"the logits of .* differ between calls with and without")
    ):
        check_logits(actual, expected, "a model", rounding(dtype, num_layers))
