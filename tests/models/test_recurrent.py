"""Recurrent and hybrid models: decoded as transformers decodes them, or refused; their states rolled back exactly."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from helpers.tiny import SMALL
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.mutants import STATE_MUTANTS, StateOfPreviousToken, maker
from specdec.conformance.toys import QUARTERS
from specdec.models.base import prefill
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.state.recurrent import RecurrentCache, StateRing, places_of
from specdec.requests import Request
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens

SIZES = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
ALTERNATING = {"layer_types": ["linear_attention", "full_attention"]}
GATED = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
GATED |= ALTERNATING
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 16}
MAMBA = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_next": SIZES | GATED | SHARED,
    "qwen3_5_text": SIZES | GATED,
    "qwen3_5_moe_text": SIZES | GATED | SHARED,
    "olmo_hybrid": SIZES | GATED,
    "kimi_linear": SIZES | ALTERNATING | LATENT | {
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_num_heads": 4,
        "linear_head_dim": 8,
    },
    "minimax": SIZES | ALTERNATING | {"num_local_experts": 2, "block_size": 8},
    "bailing_hybrid": SIZES | GATED | {"num_key_value_heads": 4},
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "jamba": SIZES | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
                      "num_experts": 2},
    "bamba": SIZES | MAMBA_2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": SIZES | MAMBA_2 | {"num_local_experts": 4, "layer_types": ["mamba", "attention"]},
    "falcon_h1": SIZES | MAMBA_2 | {"mamba_d_ssm": 64},
    "nemotron_h": SIZES | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
                           "ssm_state_size": 8, "n_groups": 1, "chunk_size": 4},
    "zamba": SIZES | {"num_hidden_layers": 4, "mamba_d_state": 4, "mamba_dt_rank": 4, "n_mamba_heads": 2,
                      "attention_head_dim": 16, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": SIZES | {"mamba_d_state": 8, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1,
                       "chunk_size": 4, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": SIZES | EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": SIZES | {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4] * 6, [7, 7, 30]]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def made(kind: str, std: float = 0.3, **options: Any) -> Any:
    """A random model whose outputs vary. std: of its matrices."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind] | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=std)
    return model


def noised(model: Any, noise: float = 0.02) -> Any:
    """A copy, as a draft that is often right."""
    torch.manual_seed(1)
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return draft


def generated(model: Any, prompt: list[int], num_tokens: int = GREEDY.max_tokens) -> list[int]:
    """What transformers generates from a prompt, alone."""
    options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_speculation_equals_generate(kind: str) -> None:
    """A batch of unequal lengths, with n-gram drafts and with drafts of a model of the same kind.

    Zamba 2 and Nemotron-H have smaller weights, see `test_time_steps_are_clamped_without_a_cache_only`.
    """
    model = made(kind, std=0.1 if kind in ("zamba2", "nemotron_h") else 0.3)
    draft = noised(model)  # before the model is loaded, so that their mixers are their own
    expected = [generated(model, prompt) for prompt in PROMPTS[:3]]
    assert len({tuple(tokens) for tokens in expected}) > 1
    target = CausalLM(model)
    for options in ({"method": "ngram"}, {"method": "draft_model", "draft": CausalLM(draft)}):
        found = Engine(target, max_batch_size=3, num_speculative_tokens=4, **options).generate(PROMPTS[:3], GREEDY)
        assert [list(each.token_ids) for each in found] == expected
        counts = [each.counts for each in found]
        drafted, accepted = sum(c.num_drafted for c in counts), sum(c.num_accepted for c in counts)
        assert options["method"] == "ngram" or 0 < accepted < drafted, "nothing was rolled back"


@cache
def hybrid() -> Any:
    return made("qwen3_5_text")


@pytest.mark.parametrize("kind", ["qwen3_next", "mamba", "lfm2"])
def test_the_first_layers_draft_on_the_states_of_the_target(kind: str) -> None:
    model = made(kind)
    expected = [generated(model, prompt, 24) for prompt in PROMPTS]
    engine = Engine(CausalLM(model), method="early_exit", exit_layer=1, num_speculative_tokens=3, max_batch_size=3)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    assert [list(each.token_ids) for each in engine.generate(PROMPTS, params)] == expected


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba"])
def test_samples_of_a_prompt_equal_those_of_separate_requests(kind: str) -> None:
    """Three samples in two slots: the second copies the prompt's state, the third finds it gone and reads again."""
    target, params = CausalLM(made(kind)), SamplingParams(max_tokens=20, n=3, seed=5, ignore_eos=True)
    outputs = [
        [each.token_ids for each in Engine(target, method="ngram", max_batch_size=slots).generate([PROMPTS[0]], params)]
        for slots in (1, 2, 3)
    ]
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba", "mamba2", "lfm2"])
def test_a_prompt_read_in_chunks_leaves_the_same_states(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba cannot continue from a state in parallel; the chunks after the first are read token by token."""
    target, text = CausalLM(made(kind)), PROMPTS[2]
    caches = [target.allocate(2, 32) for _ in range(2)]
    whole = prefill(target, text, caches[0], 1)
    monkeypatch.setattr("specdec.models.base.PREFILL_CHUNK", 5)
    torch.testing.assert_close(prefill(target, text, caches[1], 1), whole, rtol=1e-4, atol=1e-4)
    for (_, actual), (_, expected) in zip(*(each.states(1, len(text)) for each in caches), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_model_in_16_bits_may_have_logits_in_float32(kind: str) -> None:
    """The trial on loading allows for the rounding of the weights' dtype."""
    target = CausalLM(made(kind).bfloat16())
    logits = target.forward(torch.tensor([[5, 9]]), target.allocate(1, 8))
    assert (target.dtype, logits.dtype) == (torch.bfloat16, torch.float32)


def test_a_step_is_rolled_back_to_any_of_its_tokens() -> None:
    """Rows of unequal length keep different numbers of tokens, one row beside a slot that is empty."""
    target = CausalLM(hybrid())
    cache = target.allocate(4, 40, max_rollback=3)
    texts = {1: [5, 9, 8], 2: [11, 4, 11, 4], 3: [7]}
    for slot, text in texts.items():
        prefill(target, text, cache, slot)
    drafts = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    target.forward(drafts, cache)
    kept = {1: 1, 2: 4, 3: 2}
    for slot, number in kept.items():
        cache.num_cached[slot] = len(texts[slot]) + number
    logits = target.forward(torch.full((4, 1), 20), cache)
    for slot, number in kept.items():
        tokens = [*texts[slot], *drafts[slot, :number].tolist(), 20]
        expected = prefill(target, tokens, target.allocate(1, 40), 0)
        torch.testing.assert_close(logits[slot, -1], expected[0, -1], rtol=1e-4, atol=1e-4)


def test_a_state_that_is_not_kept_is_an_error() -> None:
    target = CausalLM(hybrid())
    cache = target.allocate(1, 40, max_rollback=2)
    prefill(target, PROMPTS[2], cache, 0)
    assert [cache.holds(0, length) for length in (0, 11, 12)] == [True, False, True]
    target.forward(torch.ones(1, 5, dtype=torch.int64), cache)
    assert [cache.holds(0, length) for length in (12, 14, 15, 17)] == [False, False, True, True]
    cache.num_cached[0] = 14
    message = r"slot 0 cannot continue after 14 tokens, because its recurrent states are those after 15, 16, 17"
    with pytest.raises(ValueError, match=message):
        target.forward(torch.ones(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="cannot continue after 11 tokens"):
        cache.copy_slot(0, 0, 11)


def test_a_rollback_forgets_the_states_after_it() -> None:
    ring = StateRing(num_slots=1, depth=4)

    def write(length: int, value: float) -> None:
        ring.write(0, [length], torch.full((1, 2), value), torch.tensor(places_of(0, [length], 4)))

    for length in (5, 6, 7, 8):
        write(length, length)
    ring.truncate(0, 6)
    assert ring.lengths(0) == [5, 6]
    write(7, 70)
    assert ring.read(0, [7]).tolist() == [[70.0, 70.0]]
    with pytest.raises(ValueError, match="cannot continue after 8 tokens"):
        ring.read(0, [8])


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_states_take_the_memory_of_one_per_drafted_token_and_one(num_tokens: int) -> None:
    target, slots = CausalLM(hybrid()), 3
    cache = target.allocate(slots, 64, max_rollback=num_tokens)
    prefill(target, PROMPTS[0], cache, 0)
    taken = sum(ring.block.nbytes for ring in cache.rings)
    one = sum(states.nbytes for _, states in cache.states(0, len(PROMPTS[0])))
    assert taken == slots * (num_tokens + 1) * one


def test_token_trees_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="use a method that drafts chains"):
        Engine(CausalLM(hybrid()), method="tree", draft=CausalLM(noised(hybrid())), num_speculative_tokens=4)


# ---- what transformers does


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "recurrent_gemma",
            SIZES | {"lru_width": 32, "num_hidden_layers": 3},
            "layer 0 of RecurrentGemmaFor.* keeps a recurrent state",
        ),
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61}, "outside of transformers' cache"),
        (
            "xlstm",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 61, "num_heads": 4},
            r"xLSTMForCausalLM keeps recurrent states and does not support transformers' cache",
        ),
    ],
)
def test_states_outside_of_the_cache_are_refused(kind: str, options: dict, message: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        CausalLM(model)


@pytest.mark.parametrize("kind", ["zamba2", "nemotron_h"])
def test_time_steps_are_clamped_without_a_cache_only(kind: str) -> None:
    """transformers 5.23 bounds Mamba 2's time steps by `time_step_min` unless it reads a single token from a state.

    So its logits differ with a cache and without one. Here they are those without one, always bounded.
    """
    tokens, differences = torch.arange(9).mul(7919).remainder(61)[None], []
    for least in (0.001, 1e-12):
        model = made(kind, time_step_min=0.001)
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = (least, float("inf"))
        model, state = model.double(), DynamicCache(config=model.config)
        with torch.inference_mode():
            whole = model(tokens, use_cache=False).logits[0]
            steps = torch.cat(
                [model(one, past_key_values=state, use_cache=True).logits[0] for one in tokens.split(1, 1)]
            )
        differences.append(float((steps - whole).norm() / whole.norm()))
    assert differences[0] > 100 * differences[1]
    target = CausalLM(made(kind))
    cache = target.allocate(1, 16)
    prefill(target, tokens[0, :3].tolist(), cache, 0)
    with torch.inference_mode():
        whole = target.model(tokens, use_cache=False).logits[0, 3:]
    torch.testing.assert_close(target.forward(tokens[:, 3:], cache)[0], whole, rtol=1e-4, atol=1e-4)


# ---- sampling, and planted bugs

VOCAB, PROMPT, GRID = 3, (1, 2, 0), (4, 2, 4)


class OnGrid(CausalLM):
    """A model whose distributions are rounded to quarters, so that its output distribution can be enumerated."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return rounded(super().forward(*args, **kwargs))


def rounded(logits: torch.Tensor) -> torch.Tensor:
    probs = logits.double().softmax(-1)
    return QUARTERS[(probs.unsqueeze(-2) - QUARTERS).abs().sum(-1).argmin(-1)].log()


@cache
def grid_pair(kind: str) -> tuple[Any, CausalLM, CausalLM]:
    """A model, and it and a draft as rounded targets."""
    small = {"vocab_size": VOCAB, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    model = made(kind, std=0.6, **small)
    models = [OnGrid.__new__(OnGrid) for _ in range(2)]
    for each, plain in zip(models, (model, noised(model, 0.3)), strict=True):
        each._describe(plain, None)
    return model, *models


def joint_distribution(model: Any, num_tokens: int) -> dict[tuple[int, ...], float]:
    """The distribution of the next tokens, each from a call without a cache."""
    going = {(): 1.0}
    for _ in range(num_tokens):
        texts = torch.tensor([[*PROMPT, *output] for output in going])
        with torch.inference_mode():
            rows = rounded(model(texts, use_cache=False).logits[:, -1]).exp().tolist()
        going = {
            (*output, token): mass * prob
            for (output, mass), row in zip(going.items(), rows, strict=True)
            for token, prob in enumerate(row)
            if prob
        }
    return going


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba"])
def test_joint_distribution_across_step_boundaries(kind: str) -> None:
    model, target, draft = grid_pair(kind)
    expected = joint_distribution(model, 4)
    assert len(expected) > 20
    assert distance(exact_distribution(maker(target, draft, gamma=1), PROMPT, 4, GRID), expected) < 1e-12


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba"])
@pytest.mark.parametrize("name", STATE_MUTANTS)
def test_mutant_changes_the_joint_distribution(name: str, kind: str) -> None:
    model, target, draft = grid_pair(kind)
    if name.startswith("S4"):
        pytest.skip("each sequence of an enumeration has a slot of its own; the greedy outputs show it")
    broken = exact_distribution(STATE_MUTANTS[name](target, draft, 1), PROMPT, 4, GRID)
    assert distance(broken, joint_distribution(model, 4)) > 0.01


@pytest.mark.parametrize("name", ["none", *STATE_MUTANTS])
def test_mutant_changes_the_greedy_output(name: str) -> None:
    target, draft = (CausalLM(each) for each in (made("qwen3_5_text"), noised(made("qwen3_5_text"))))
    make = STATE_MUTANTS.get(name, maker)(target, draft, 3)
    requests = [Request(index, tuple(prompt), GREEDY) for index, prompt in enumerate(PROMPTS)]
    rows = sorted(make(uniforms, verify_tokens, 2).run(requests), key=lambda row: row.request.index)
    expected = [generated(target.model, prompt) for prompt in PROMPTS]
    assert ([row.output for row in rows] == expected) == (name == "none")


def test_a_wrong_rollback_of_states_is_seen_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def __init__(self: RecurrentCache, layers: Any, num_slots: int, capacity: int, depth: int, local: Any) -> None:
        init(self, layers, num_slots, capacity, depth, local)
        self.new_ring = lambda kind: StateOfPreviousToken(num_slots, depth)

    init = RecurrentCache.__init__
    monkeypatch.setattr(RecurrentCache, "__init__", __init__)
    with pytest.raises(UnsupportedModelError, match=r"the logits of .* differ|recurrent state of layer 0 .* differs"):
        CausalLM(made("qwen3_5_text"))
