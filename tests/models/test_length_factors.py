"""LongRoPE: the factors of a token are those of its own text, whatever is computed beside, after or before it."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import GQA, PROMPTS, make, reference

from specdec import Engine, SamplingParams
from specdec.models.base import FINAL, prefill
from specdec.models.causal import CausalLM, UnsupportedModelError

THRESHOLD = 14  # the shortest prompt crosses it late, the longest one early
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 2.0, 1.5, 4.0],
    "original_max_position_embeddings": THRESHOLD,
    "short_mscale": 1.0,
    "long_mscale": 1.3,
}
KINDS = {
    "phi3": GQA,
    "phimoe": GQA | {"num_local_experts": 2, "sliding_window": None},
    "llama": GQA,
}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def longrope(kind: str, threshold: int = THRESHOLD):
    rope = LONGROPE | {"original_max_position_embeddings": threshold}
    options = KINDS[kind] | {"rope_parameters": rope, "max_position_embeddings": 64}
    if kind != "llama":
        options["original_max_position_embeddings"] = threshold
    return make(kind, options)


@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_plain_forwards_in_any_batch(kind: str, monkeypatch) -> None:
    """Any draft, any batch, prompts on both sides of the threshold and in chunks: each row has its own factors."""
    model = longrope(kind)
    prompts = [*PROMPTS, list(range(3, 25)), [9] * THRESHOLD, [8] * (THRESHOLD - 1)]
    expected = [reference(model, prompt) for prompt in prompts]
    never = longrope(kind, threshold=60)
    never.load_state_dict(model.state_dict())
    assert [reference(never, prompt) for prompt in prompts] != expected  # the factors matter
    target = CausalLM(model)
    engines = {
        "plain": Engine(target),
        "ngram": Engine(target, method="ngram", num_speculative_tokens=5, max_batch_size=4),
        "self": Engine(target, method="draft_model", draft=target, num_speculative_tokens=4, max_batch_size=2),
        "tree": Engine(target, method="tree", draft=target, tree=[(0,), (1,), (0, 0), (1, 0), (0, 0, 0)]),
    }
    for chunk in (512, 5):
        monkeypatch.setattr("specdec.models.base.PREFILL_CHUNK", chunk)
        for name, engine in engines.items():
            assert [list(c.token_ids) for c in engine.generate(prompts, GREEDY)] == expected, (name, chunk)


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_generate_gives_the_same(kind: str) -> None:
    """These start over where a text crosses the threshold, so that `generate` is what plain forwards give."""
    model = longrope(kind)
    prompt = PROMPTS[2]
    generated = Engine(CausalLM(model), method="ngram").generate([prompt], GREEDY)[0].token_ids
    reference = model.generate(
        torch.tensor([prompt]), max_new_tokens=GREEDY.max_tokens, do_sample=False, eos_token_id=None
    )
    assert list(generated) == reference[0, len(prompt) :].tolist()


def test_samples_copy_the_factors_of_their_slot() -> None:
    engine = Engine(CausalLM(longrope("phi3")), method="ngram", max_batch_size=2)
    prompt = list(range(3, 25))
    first, second = engine.generate([prompt], SamplingParams(n=2, temperature=0, max_tokens=8, ignore_eos=True))
    assert first.token_ids == second.token_ids


def test_the_wrapped_model_itself_stays_as_it_was() -> None:
    model = longrope("phi3")
    prompt = torch.tensor([list(range(3, 25))])
    with torch.inference_mode():
        before = model(input_ids=prompt, use_cache=False).logits
        CausalLM(model)
        Engine(CausalLM(model)).generate([[1, 2, 3]], GREEDY)
        assert torch.equal(model(input_ids=prompt, use_cache=False).logits, before)


def test_incompatible_options_are_refused() -> None:
    target = CausalLM(longrope("llama"))
    with pytest.raises(UnsupportedModelError, match=r"length-dependent rotary factors.*use another method"):
        Engine(target, method="early_exit", exit_layer=1)
    with pytest.raises(ValueError, match=r"records=True must be left out"):
        Engine(target, records=True)


@pytest.mark.parametrize("name", ["local_window", "chunk_length", "floor_scale", "block_size", "index_topk"])
@pytest.mark.parametrize("length", [9, 20, 40])
def test_a_model_that_computes_by_the_longest_row_from_some_length_on_is_refused(name: str, length: int) -> None:
    """The config names the length, so it is tried there: what a call's longest row changes, changes in no other row."""
    model = make("llama", GQA)
    setattr(model.config, name, length)
    rotary = model.model.rotary_emb
    plain = rotary.forward

    def by_the_longest(x, position_ids):
        cos, sin = plain(x, position_ids)
        return (cos, sin) if position_ids.max() < length else (cos * 0.5, sin * 2)

    rotary.forward = by_the_longest
    with pytest.raises(
        UnsupportedModelError,
        match="the logits of LlamaForCausalLM differ between calls with and without per-row positions",
    ):
        CausalLM(model)


def test_long_thresholds_are_tried_with_the_first_layers(monkeypatch) -> None:
    """A text as long as that costs much: as many layers as have one of each kind are enough to see it."""
    seen = []
    monkeypatch.setattr("specdec.models.trial.check_logits", lambda actual, expected, *_: seen.append(actual))
    options = GQA | {"num_hidden_layers": 4, "max_position_embeddings": 1000}
    model = make("llama", options)
    model.config.chunk_length = 300
    calls = []
    model.model.layers[2].register_forward_hook(lambda layer, inputs, output: calls.append(inputs[0].shape[1]))
    CausalLM(model)
    assert len(seen) == 3  # the base trial, one chunk, two chunks
    assert calls
    assert max(calls) < 20


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_that_the_logits_are_computed_from(kind: str) -> None:
    """Of a text below the threshold, of drafts that cross it, of the same after a rejection, and beyond it."""
    model = longrope(kind)
    target, text = CausalLM(model), list(range(3, 25))
    cache = target.allocate(2, 32, features=(1, FINAL))

    def check(columns: range, length: int) -> None:
        """The features of these columns are those of a text of that length, by transformers."""
        with torch.inference_mode():
            states = model(torch.tensor([text[:length]]), use_cache=False, output_hidden_states=True).hidden_states
        wanted = torch.cat([states[1], states[-1]], -1)[0, columns.start : columns.stop]
        torch.testing.assert_close(cache.features[1, columns.start : columns.stop], wanted, rtol=1e-3, atol=1e-3)

    prefill(target, text[: THRESHOLD - 2], cache, 1)
    check(range(THRESHOLD - 2), THRESHOLD - 2)
    crossing = torch.tensor([[5] * 5, text[THRESHOLD - 2 : THRESHOLD + 3]])
    target.forward(crossing, cache)
    check(range(THRESHOLD - 2, THRESHOLD), THRESHOLD)
    check(range(THRESHOLD, THRESHOLD + 3), THRESHOLD + 3)
    cache.num_cached[1] = THRESHOLD - 1  # one of five is kept
    target.forward(crossing[:, 1:2], cache)
    check(range(THRESHOLD), THRESHOLD)
    cache.num_cached[1] = THRESHOLD
    target.forward(crossing[:, 2:], cache)
    check(range(THRESHOLD + 3), THRESHOLD + 3)
