"""Features: the hidden states of chosen layers that a target keeps in its cache, against those of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import accelerate
import pytest
import torch
from helpers.tiny import GQA, PROMPTS, SMALL, SUPPORTED, make
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from specdec import Engine, SamplingParams
from specdec.kernels import cpp
from specdec.models import loading
from specdec.models.base import FINAL, FeatureLayers, prefill
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.features import HiddenStates
from specdec.models.fusion import FusedDecoder, Stack, fuse
from specdec.models.markov import MarkovModel
from specdec.models.seq2seq import Seq2SeqLM
from specdec.requests import Batch
from specdec.runtime.recording import Recorder
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree
from specdec.verification import Draft

NUM_LAYERS = 4
DEEP = {"num_hidden_layers": NUM_LAYERS}
WIDE = GQA | DEEP | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}  # shapes that the kernels support
KINDS = {
    "llama": GQA | DEEP,
    "qwen3": GQA | DEEP,
    "mistral": GQA | DEEP | {"sliding_window": None},
    "gpt2": SMALL | DEEP | {"n_inner": 48},
    "gemma2": GQA | DEEP | {"query_pre_attn_scalar": 8, "sliding_window": 64},
    "phi": SMALL | DEEP,
}
LAYERS: Sequence[FeatureLayers] = [(0,), (1, 3), (NUM_LAYERS,), (FINAL,), (2, 1), (FINAL, 0, 4, 3, 2, 1)]
TREE = Tree(((0,), (1,), (0, 0), (1, 0), (1, 1)))


def all_states(model: Any, tokens: Sequence[int]) -> dict[int, Tensor]:
    """transformers' own hidden states [tokens, hidden] of a text by `FeatureLayers` index, computed without a cache.

    Its last one is after the final norm; the last layer's output is what the norm reads.
    """
    body, before_norm = model.base_model, []
    norm = next(getattr(body, name) for name in ("norm", "ln_f", "final_layernorm") if hasattr(body, name))
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.inference_mode():
        states = model(torch.tensor([list(tokens)]), use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(states) == NUM_LAYERS + 1
    by_index = {**dict(enumerate(states[:-1])), NUM_LAYERS: before_norm[0], FINAL: states[-1]}
    return {index: each[0] for index, each in by_index.items()}


def expected(model: Any, tokens: Sequence[int], layers: FeatureLayers) -> Tensor:
    """Features [tokens, sum of widths] of a text."""
    states = all_states(model, tokens)
    return torch.cat([states[layer] for layer in layers], -1)


def check(features: Tensor, wanted: Tensor, num_layers: int) -> None:
    """Raise AssertionError unless the features of each layer are the wanted ones, [tokens, width].

    In float32 of every token, in bfloat16 on average: the random weights amplify a rounding now and then.
    """
    assert features.shape == wanted.shape
    for actual, right in zip(features.chunk(num_layers, -1), wanted.chunk(num_layers, -1), strict=True):
        errors = (actual.float() - right.float()).norm(dim=-1) / right.float().norm(dim=-1)
        assert errors.max() < 1e-4 if features.dtype == torch.float32 else errors.mean() < 0.1


def check_slot(cache: Any, slot: int, model: Any, tokens: Sequence[int]) -> None:
    layers = cache.feature_layers
    check(cache.features[slot, : len(tokens)], expected(model, tokens, layers), len(layers))


def random_tokens(*shape: int) -> list[Any]:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def run_all(target: CausalLM, model: Any, layers: FeatureLayers) -> None:
    """A ragged batch through prefill in chunks, steps, a rejection, a refilled slot, a copied one and a tree."""
    texts = [text[:length] for text, length in zip(random_tokens(3, 30), (13, 5, 9), strict=True)]
    cache = target.allocate(3, 32, features=layers)
    for slot, text in enumerate(texts):
        for start in range(0, len(text), 4):
            prefill(target, text[start : start + 4], cache, slot)
        check_slot(cache, slot, model, text)
    step(target, cache, texts, random_tokens(3, 4), kept=[4, 1, 2])
    check_texts(cache, model, texts)
    step(target, cache, texts, random_tokens(3, 3), kept=[1, 3, 1])
    check_texts(cache, model, texts)
    cache.num_cached[1] = 0
    texts[1] = random_tokens(7)
    prefill(target, texts[1], cache, 1)
    cache.copy_slot(0, 2, 12)
    texts[2] = texts[0][:12]
    step(target, cache, texts, random_tokens(3, 2), kept=[2, 1, 2])
    check_texts(cache, model, texts)
    step_of_trees(target, cache, texts)
    check_texts(cache, model, texts)


def check_texts(cache: Any, model: Any, texts: Sequence[Sequence[int]]) -> None:
    for slot, text in enumerate(texts):
        assert cache.num_cached[slot] == len(text)
        check_slot(cache, slot, model, text)


def step(target: CausalLM, cache: Any, texts: list[list[int]], tokens: list[list[int]], kept: list[int]) -> None:
    target.forward(torch.tensor(tokens), cache)
    for slot, number in enumerate(kept):
        texts[slot] += tokens[slot][:number]
        cache.num_cached[slot] += number


def step_of_trees(target: CausalLM, cache: Any, texts: list[list[int]]) -> None:
    """A token and a tree after it, of which the path through nodes 1 and 4 is accepted in each row."""
    tokens, path = torch.tensor(random_tokens(3, 1 + len(TREE))), torch.tensor([[0, 2, 5]] * 3)
    target.forward(tokens, cache, branches=Branches.after_root(TREE.parents))
    cache.keep(torch.tensor(cache.num_cached), path)
    for slot in range(3):
        texts[slot] += tokens[slot, path[slot]].tolist()
        cache.num_cached[slot] += path.shape[1]


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_hidden_states_of_transformers(kind: str, layers: FeatureLayers) -> None:
    model = make(kind, KINDS[kind], attention="eager" if kind == "gemma2" else "sdpa")
    run_all(CausalLM(model), model, layers)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kernels", [False, True])
def test_features_of_fused_layers(layers: FeatureLayers, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = fused("llama", torch.float32, kernels, monkeypatch)
    run_all(target, model, layers)


def fused(
    kind: str, dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any] = WIDE
) -> tuple[CausalLM, Any]:
    """A model of fused layers, with kernels or without, and the same one as transformers has it."""
    if not cpp.available(dtype):
        pytest.skip("kernels need Linux, a C++ compiler and AVX-512, in bfloat16 AVX512-BF16")
    model = make(kind, options, dtype)
    fuse(model)
    assert isinstance(model.model, FusedDecoder)
    if not kernels:
        monkeypatch.setattr(Stack, "supports", lambda stack, width: False)
    return CausalLM(model), make(kind, options, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_with_kernels_features_change_no_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the logits nor of the keys and values; and features do not depend on how a text is cut."""
    target, model = fused(kind, dtype, True, monkeypatch)
    tokens = torch.tensor(random_tokens(3, 20))
    caches = [target.allocate(3, 20, features=layers) for layers in ((), (1, 3), (4, 2, 0, FINAL))]
    plain, *others = (target.forward(tokens, cache) for cache in caches)
    assert all(torch.equal(plain, each) for each in others)
    for layer in range(NUM_LAYERS):
        assert all(torch.equal(caches[0].layers[layer].keys, cache.layers[layer].keys) for cache in caches[1:])
        assert all(torch.equal(caches[0].layers[layer].values, cache.layers[layer].values) for cache in caches[1:])
    pieces = target.allocate(3, 20, features=(4, 2, 0, FINAL))
    for width in (7, 1, 3, 9):
        start = pieces.num_cached[0]
        target.forward(tokens[:, start : start + width], pieces)
        pieces.num_cached[:] = [start + width] * 3
    assert torch.equal(pieces.features, caches[2].features)
    for slot, text in enumerate(tokens.tolist()):
        check_slot(pieces, slot, model, text)


@pytest.mark.parametrize("layers", [(1,), (2, 3), (FINAL, 3), (4,), (0,)])
def test_a_neighboring_layer_is_seen(layers: FeatureLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails for the layer before or after, for the final state for the last layer's, and in disorder."""
    model = make("llama", KINDS["llama"])
    hook, order = HiddenStates._hook, (*range(NUM_LAYERS + 1), FINAL)
    for shift in (-1, 1):
        with monkeypatch.context() as patched:
            patched.setattr(
                HiddenStates,
                "_hook",
                lambda states, index, take, shift=shift: hook(states, order[(order.index(index) + shift) % 6], take),
            )
            with pytest.raises(AssertionError):
                run_all(CausalLM(model), model, layers)
    run_all(CausalLM(model), model, layers)
    if len(layers) > 1:
        target = CausalLM(model)
        cache = target.allocate(1, 8, features=layers[::-1])
        prefill(target, [5, 6, 7], cache, 0)
        with pytest.raises(AssertionError):
            check(cache.features[0, :3], expected(model, [5, 6, 7], layers), 2)


def test_a_neighboring_layer_of_the_kernels_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    target, model = fused("llama", torch.float32, True, monkeypatch)
    run = cpp.run_layers

    def one_off(*arguments: Any) -> list[Tensor]:
        *before, after, inputs = arguments
        return run(*before, [n - 1 if n < NUM_LAYERS else n for n in after], inputs)

    monkeypatch.setattr(cpp, "run_layers", one_off)
    run_all(target, model, (FINAL,))
    with pytest.raises(AssertionError):
        run_all(target, model, (FINAL, 2))


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_every_supported_architecture_gives_its_layers(kind: str) -> None:
    """Embeddings, a layer's output and the final state, as `output_hidden_states` has them."""
    model = make(kind, SUPPORTED[kind], attention="eager")
    target, tokens = CausalLM(model), random_tokens(9)
    cache = target.allocate(2, 16, features=(FINAL, 1, 0))
    prefill(target, tokens, cache, 1)
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    check(cache.features[1, :9], torch.cat([states[-1][0], states[1][0], states[0][0]], -1), 3)


def test_layers_may_differ_in_width() -> None:
    """OPT-350M projects its embeddings to the layers' width, and the final state back."""
    model = make("opt", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 16})
    target, tokens = CausalLM(model), random_tokens(9)
    cache = target.allocate(1, 16, features=(1, FINAL, 0))
    prefill(target, tokens, cache, 0)
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), use_cache=False, output_hidden_states=True).hidden_states
    assert cache.features.shape == (1, 16, 32 + 16 + 32)
    for actual, index in zip(cache.features[0, :9].split([32, 16, 32], -1), (1, -1, 0), strict=True):
        check(actual, states[index][0], 1)


# ---- through the decoding loop


class Watching:
    """A proposer that compares the features of all committed tokens but the newest before each draft."""

    def __init__(self, proposer: Any, model: Any, layers: FeatureLayers) -> None:
        self.feature_layers, self._proposer, self._model, self.num_checked = layers, proposer, model, 0

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        assert batch.features is not None
        for slot, row in enumerate(batch.rows):
            if row:
                wanted = expected(self._model, row.tokens[:-1] or row.tokens, self.feature_layers)
                length = len(row.tokens) - 1
                check(batch.features[slot, :length], wanted[:length], len(self.feature_layers))
                self.num_checked += 1
        return self._proposer.propose(batch, limits)

    def forget(self) -> None:
        self._proposer.forget()


def disturbed(kind: str, options: dict[str, Any]) -> CausalLM:
    """A draft model whose tokens the model of the same kind sometimes rejects."""
    model = make(kind, options)
    torch.manual_seed(5)
    for weight in model.parameters():
        weight.data += 0.03 * torch.randn_like(weight)
    return CausalLM(model)


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize("method", ["draft_model", "tree"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama fused"])
def test_features_stay_in_step_with_decoding(
    kind: str, method: str, records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slots for ten samples of five prompts that are read in chunks, with accepted and rejected drafts."""
    name, options = kind.split()[0], WIDE if "fused" in kind else KINDS[kind]
    monkeypatch.setattr("specdec.models.base.PREFILL_CHUNK", 5)
    model, layers = make(name, options), (3, 0, FINAL, 1)
    own = make(name, options)
    if "fused" in kind:
        fuse(own)
    more: dict[str, Any] = {"tree": TREE} if method == "tree" else {"num_speculative_tokens": 3}
    engine = Engine(
        CausalLM(own), method=method, draft=disturbed(name, options), records=records, max_batch_size=3, **more
    )
    watching = Watching(engine._decoder.proposer, model, layers)
    engine._decoder.proposer = watching
    sampling = SamplingParams(n=2, temperature=1, max_tokens=12, ignore_eos=True, seed=7)
    completions = engine.generate([*PROMPTS, random_tokens(19)], sampling)
    counts = [each.counts for each in completions]
    num_drafted, num_accepted = sum(each.num_drafted for each in counts), sum(each.num_accepted for each in counts)
    assert watching.num_checked > 40
    assert 10 < num_accepted < num_drafted - 10


def test_a_recorded_step_keeps_features() -> None:
    """In calls of one shape, the second of which is recorded and the third replayed."""
    model = make("llama", KINDS["llama"])
    target, recorder, text = CausalLM(model), Recorder(torch.device("cpu"), records=True), random_tokens(20)
    cache = target.allocate(2, recorder.capacity(20), features=(2, FINAL))
    prefill(target, text[:5], cache, 1)
    for start in range(5, 20, 3):
        tokens, starts = torch.tensor([[7, 7, 7], text[start : start + 3]]), torch.tensor([0, start])
        recorder(target.forward_at, tokens, starts, cache, cache.extent_for(start + 3))
    check_slot(cache, 1, model, text)


def test_a_model_cut_to_its_first_layers_leaves_the_features_alone() -> None:
    target = CausalLM(make("llama", KINDS["llama"]))
    cache = target.allocate(1, 8, features=(3, FINAL))
    prefill(target, [5, 6, 7], cache, 0)
    before = cache.features.clone()
    target.first_layers(2).forward(torch.tensor([[8, 9]]), cache)
    assert torch.equal(cache.features, before)


def test_features_of_a_model_over_several_devices() -> None:
    """Through accelerate's hooks, which on GPUs move what a layer reads; here all are the same processor."""
    model, spread = (make("llama", KINDS["llama"]) for _ in range(2))
    device_map = loading._device_map(spread, [torch.device("cpu")] * NUM_LAYERS)
    accelerate.dispatch_model(spread, device_map, force_hooks=True, skip_keys=spread._skip_keys_device_placement)
    run_all(CausalLM(spread), model, (3, FINAL, 0))


def test_the_hooks_are_gone_after_a_call() -> None:
    model = make("llama", KINDS["llama"])
    target = CausalLM(model)
    prefill(target, [5, 6, 7], target.allocate(1, 8, features=(3, FINAL, 0)), 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- refusals


@pytest.mark.parametrize("layers", [(5,), (1, 7), (-2, 1)])
def test_layers_that_the_model_does_not_have_are_refused(layers: FeatureLayers) -> None:
    target = CausalLM(make("llama", KINDS["llama"]))
    message = r"must be from 0, the embeddings, to 4, the number of layers of LlamaForCausalLM, or -1 .*; correct "
    with pytest.raises(ValueError, match=message) as refusal:
        target.allocate(1, 8, features=layers)
    assert str(refusal.value).startswith(f"features={layers}")


def test_layers_with_several_streams_are_refused() -> None:
    """Gemma 3n has four hidden states per token between its layers; its final state is one."""
    options = GQA | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "laurel_rank": 4}
    options |= {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0], "num_kv_shared_layers": 0}
    target = CausalLM(make("gemma3n_text", options, attention="eager"))
    with pytest.raises(UnsupportedModelError, match=r"features=\(1, -1\) needs a model with a list of layers.*\[-1\]"):
        target.allocate(1, 8, features=(1, FINAL))
    cache = target.allocate(1, 8, features=(FINAL,))
    prefill(target, [5, 6, 7], cache, 0)
    assert cache.features[0, :3].abs().min() > 0


def test_models_without_hidden_states_refuse() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    config = T5Config(**sizes, vocab_size=61, decoder_start_token_id=0)
    for target in (Seq2SeqLM(T5ForConditionalGeneration(config).eval()), MarkovModel(torch.full((3, 3, 3), 1 / 3))):
        with pytest.raises(ValueError, match=r"features=\(1, 2\) must be \(\) for .*; use a method without a head"):
            target.allocate(1, 8, features=(1, 2))
