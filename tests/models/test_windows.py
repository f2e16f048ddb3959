"""Layers with sliding windows or chunks: decoded beyond the window, in rings, with exact rollback across the wrap."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from helpers.audited import ToyEngine
from helpers.tiny import GQA, SMALL, make
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import Engine, SamplingParams
from specdec.conformance import mutants
from specdec.conformance.audit import audit
from specdec.conformance.enumeration import exact_distribution, pieces_between
from specdec.conformance.gates import distance
from specdec.conformance.mutants import maker
from specdec.conformance.mutants.states import BySlot, FewColumns
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import AuditLimits
from specdec.models.base import prefill
from specdec.models.causal import CausalLM, UnsupportedModelError
from specdec.models.fusion import fuse
from specdec.models.markov import MarkovModel
from specdec.models.state.ragged import RaggedCache
from specdec.models.state.windows import LocalAttention
from specdec.requests import Request
from specdec.sampling.randomness import uniforms
from specdec.trees.columns import Branches
from specdec.verification import verify_tokens

WINDOW, SPARE = 8, 16
RING = WINDOW + SPARE
TWO_RINGS = 2 * RING + 6
LONG = GQA | {"max_position_embeddings": 128, "initializer_range": 0.3}
MIXED = LONG | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = MIXED | {"query_pre_attn_scalar": 8, "tie_word_embeddings": False}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0, 2.0, 1.5, 4.0],
    "original_max_position_embeddings": 40,
}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": LONG | {"sliding_window": WINDOW},
    "ministral": MIXED,
    "mixtral": LONG | {"sliding_window": WINDOW, "num_local_experts": 4},
    "phi3": LONG | {"sliding_window": WINDOW},
    "phi3 longrope": LONG
    | {"sliding_window": WINDOW, "rope_parameters": LONGROPE, "original_max_position_embeddings": 40},
    "phimoe": LONG | {"sliding_window": WINDOW, "num_local_experts": 2},
    "starcoder2": LONG | {"sliding_window": WINDOW},
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen2_moe": MIXED | MOE | {"use_sliding_window": True, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3": MIXED | {"use_sliding_window": True},
    "smollm3": MIXED | {"use_sliding_window": True},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma3n_text": GEMMA
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "laurel_rank": 4}
    | {"num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2, "num_kv_shared_layers": 2}
    | {"intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": GEMMA
    | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "global_head_dim": 16}
    | {"num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2, "num_kv_shared_layers": 2},
    "vaultgemma": GEMMA,
    "gpt_oss": MIXED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": MIXED,
    "olmo3": MIXED,
    "exaone4": MIXED,
    "mimo_v2_flash": MIXED
    | MOE
    | {"v_head_dim": 6, "swa_head_dim": 8, "swa_v_head_dim": 6, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "gpt_neo": SMALL
    | {"num_layers": 2, "num_heads": 4, "window_size": WINDOW, "attention_types": [[["local", "global"], 1]]}
    | {"max_position_embeddings": 128},
    "llama4_text": LONG
    | {"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"]}
    | {"num_local_experts": 2, "intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
}
EAGER = {"gemma2", "gpt_oss", "vaultgemma", "mimo_v2_flash", "gpt_neo"}  # no SDPA, or none with softcaps or sinks
PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], list(range(3, 3 + RING + 7))]  # the last is wider than a call
TREE = [(0,), (1,), (0, 0), (1, 0), (0, 0, 0)]


@pytest.fixture(autouse=True)
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings that a short text goes around twice."""
    monkeypatch.setattr("specdec.models.state.windows._FEWEST_SPARE", SPARE)


def windowed(kind: str, **changes: Any):
    return make(kind.split()[0], KINDS[kind] | changes, attention="eager" if kind in EAGER else "sdpa")


@cache
def mistral() -> Any:
    return windowed("mistral")


def generated(model: Any, prompt: list[int], num_tokens: int = TWO_RINGS) -> list[int]:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, **options)
    return tokens[0, len(prompt) :].tolist()


def greedy(engine: Engine, prompts: list[list[int]], num_tokens: int = TWO_RINGS) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return [list(completion.token_ids) for completion in engine.generate(prompts, sampling)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_speculation_equals_generate_for_two_rings(kind: str) -> None:
    """Three rows of unequal lengths, one prefilled in pieces: n-grams, a draft with windows, and a tree."""
    model = windowed(kind)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 3 for tokens in expected), "the text depends on its context"
    target = CausalLM(model)
    assert WINDOW in {local and local.size for local in target.local}
    draft = CausalLM(mistral())
    engines = {
        "ngram": Engine(target, method="ngram", max_batch_size=3),
        "windowed draft": Engine(target, method="draft_model", draft=draft, max_batch_size=3, num_speculative_tokens=3),
        "tree": Engine(target, method="tree", draft=target, tree=TREE, max_batch_size=3),
    }
    for name, engine in engines.items():
        assert greedy(engine, PROMPTS) == expected, name


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "llama4_text"])
def test_the_window_matters(kind: str) -> None:
    """Otherwise equality would show nothing."""
    name = "attention_chunk_size" if kind == "llama4_text" else "sliding_window"
    right, wrong = windowed(kind), windowed(kind, **{name: WINDOW + 1})
    wrong.load_state_dict(right.state_dict())
    assert generated(right, PROMPTS[0]) != generated(wrong, PROMPTS[0])


@pytest.mark.parametrize("method", ["autoregressive", "draft_model", "early_exit"])
def test_recorded_steps_go_around_the_ring(method: str) -> None:
    """Fixed shapes, positions on the device, and prompts in chunks as narrow as the ring allows."""
    model = windowed("gemma3_text")
    target = CausalLM(model)
    options = {"draft": CausalLM(mistral())} if method == "draft_model" else {}
    if method == "early_exit":
        options = {"exit_layer": 1}
    engine = Engine(target, method=method, max_batch_size=2, records=True, **options)
    assert greedy(engine, PROMPTS) == [generated(model, prompt) for prompt in PROMPTS]


def test_samples_share_a_prompt_only_while_the_ring_holds_it() -> None:
    """With two slots, the third sample starts after the first has overwritten the prompt."""
    model = mistral()
    engine = Engine(CausalLM(model), method="ngram", max_batch_size=2)
    sampling = SamplingParams(temperature=0, n=3, max_tokens=TWO_RINGS, ignore_eos=True)
    outputs = [list(completion.token_ids) for completion in engine.generate([PROMPTS[0]], sampling)]
    assert outputs == [generated(model, PROMPTS[0])] * 3


@pytest.mark.parametrize("size", [512, 4096])
def test_memory_is_that_of_the_window(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of 8,192: the local layer takes at most 1.25 windows, the full layer all of it."""
    monkeypatch.undo()
    options = {"sliding_window": size, "max_position_embeddings": 8192}
    target = CausalLM.__new__(CausalLM)  # the trial of a long window takes a while and is not the question
    target._describe(windowed("gemma3_text", **options), None)
    store = target.allocate(2, 8192)
    prefill(target, [5, 9, 8], store, 0)
    sizes = [layer.keys.nbytes + layer.values.nbytes for layer in store.layers]
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, slots, heads, head_dim, bytes
    assert sizes[0] <= 1.25 * size * per_token
    assert sizes[1] == 8192 * per_token


def test_as_much_context_as_the_window_holds_needs_no_ring() -> None:
    """Kernels and copies of full attention apply."""
    store = CausalLM(mistral()).allocate(1, WINDOW)
    assert store.local == (None, None)
    assert CausalLM(mistral()).allocate(1, WINDOW + 1).local == (LocalAttention(WINDOW),) * 2


# ---- rollback


@pytest.mark.parametrize("length", [RING - SPARE - 1, RING - 2, RING - 1, RING, RING + 1, 2 * RING - 1, 2 * RING])
@pytest.mark.parametrize("rejected", [1, SPARE + 1])
def test_rollback_before_at_and_after_the_wrap(length: int, rejected: int) -> None:
    """The widest call may be rejected as a whole: the logits after it are those of a plain forward."""
    model = mistral()
    target = CausalLM(model)
    text = [(7 * i * i + 3 * i) % 61 for i in range(length + 4)]
    store = target.allocate(2, 128)
    prefill(target, text[:length], store, 1)
    target.forward(torch.full((1, rejected), 11), store, first_slot=1)
    logits = target.forward(torch.tensor([text[length:]]), store, first_slot=1)[0]
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, length:]
    assert torch.allclose(logits, plain, atol=1e-4)


def test_a_rollback_beyond_the_ring_is_an_error_on_the_host() -> None:
    target = CausalLM(mistral())
    store = target.allocate(2, 128)
    prefill(target, [5] * 60, store, 0)
    lowest = 60 - SPARE - 1
    assert [store.holds(0, n) for n in (0, 1, lowest - 1, lowest, 60)] == [True, False, False, True, True]
    store.num_cached[0] = lowest - 1
    with pytest.raises(ValueError, match=rf"num_cached={lowest - 1} of slot 0 must be at least {lowest}: 60 tokens"):
        target.forward(torch.ones(1, 1, dtype=torch.int64), store)
    with pytest.raises(ValueError, match=rf"num_cached={lowest - 1} of slot 0"):
        store.reserve(0, [lowest - 1], 1)
    with pytest.raises(ValueError, match=rf"num_tokens={lowest - 1} of slot 0 cannot be copied: 60 were written"):
        store.copy_slot(0, 1, lowest - 1)
    store.num_cached[0] = 0  # a new text
    target.forward(torch.ones(1, 1, dtype=torch.int64), store)


def test_a_call_wider_than_the_ring_allows_is_split_or_refused() -> None:
    target = CausalLM(mistral())
    store = target.allocate(2, 128)
    tokens = torch.arange(80).view(2, 40) % 61
    wide = target.forward(tokens, store)
    narrow = target.allocate(2, 128)
    parts = []
    for part in tokens.split(5, 1):
        parts.append(target.forward(part, narrow))
        narrow.num_cached = [n + part.shape[1] for n in narrow.num_cached]
    assert store.num_cached == [0, 0]
    assert torch.allclose(wide, torch.cat(parts, 1), atol=1e-4)
    with pytest.raises(ValueError, match=rf"width=40 must be at most {SPARE + 1} tokens in one call"):
        target.forward_at(tokens, torch.zeros(2, dtype=torch.int64), store, 64)


def test_drafts_that_could_not_be_taken_back_are_refused() -> None:
    target = CausalLM(mistral())
    assert target.max_draft_tokens == SPARE // 2 - 1
    with pytest.raises(
        ValueError, match=r"num_speculative_tokens=8, for a tree its nodes, must be at most 7: .* window"
    ):
        Engine(target, method="ngram", num_speculative_tokens=8)
    with pytest.raises(ValueError, match="must be at most 7"):
        Engine(CausalLM(make("llama", LONG)), method="draft_model", draft=target, num_speculative_tokens=8)


def test_a_reference_reads_its_prompts_again_where_the_ring_lost_them() -> None:
    target = CausalLM(mistral())
    outputs = [[generated(mistral(), prompt)] for prompt in PROMPTS]
    reference, fresh = (Reference(target, SamplingParams(temperature=1)) for _ in range(2))
    list(reference.distributions(PROMPTS, [output[0] for output in outputs]))
    again, first = (
        torch.cat([each.logits for each in one.distributions(PROMPTS, [[7, 8]] * 3)]) for one in (reference, fresh)
    )
    assert torch.equal(again, first)


# ---- the ring beside a plain list of tokens


class Plain:
    """What a slot holds, as a list of (token, place) by column, never forgotten but by overwriting."""

    def __init__(self, num_columns: int) -> None:
        self.columns: list[tuple[int, int] | None] = [None] * num_columns
        self.text: list[int] = []

    def write(self, start: int, tokens: list[int]) -> None:
        self.text = [*self.text[:start], *tokens]
        for place, token in enumerate(tokens, start):
            self.columns[place % len(self.columns)] = (token, place)

    def can_return_to(self, length: int, size: int) -> bool:
        needed = range(max(0, length - size + 1), length)
        return all(self.columns[place % len(self.columns)] == (self.text[place], place) for place in needed)


def attended(store: RaggedCache, block: torch.Tensor, local: LocalAttention, row: int, query: int) -> list[float]:
    """The tokens, written as keys, that a query attends to, sorted."""
    seen = store.mask(torch.float32, local)[row, 0, query] == 0
    return sorted(block[row, 0, seen, 0].tolist())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_ring_equals_a_list_of_positions(data: st.DataObject) -> None:
    """Two slots, any writes, rejections and copies: a query attends to its window, or the host refuses the rollback."""
    local = LocalAttention(data.draw(st.integers(2, 6), "size"), data.draw(st.booleans(), "chunks"))
    on_device = data.draw(st.booleans(), "on the device")
    store = RaggedCache(1, 2, 100, (local,))
    plain = [Plain(store.num_columns(0)) for _ in range(2)]
    assert store.num_columns(0) == local.size + SPARE
    block, fresh = torch.zeros(2, 1, store.num_columns(0), 1), itertools.count(1)
    for _ in range(data.draw(st.integers(1, 12), "calls")):
        if data.draw(st.integers(0, 5), "copy") == 0:
            length = data.draw(st.integers(1, max(1, len(plain[0].text))))
            if len(plain[0].text) >= length and plain[0].can_return_to(length, local.size):
                assert store.holds(0, length)
                layer = store.layers[0]
                layer.keys, layer.values, layer.is_initialized = block, block, True
                store.copy_slot(0, 1, length)
                plain[1].columns, plain[1].text = [*plain[0].columns], plain[0].text[:length]
            continue
        width = data.draw(st.integers(1, store.max_width), "width")
        starts = [data.draw(st.integers(max(0, len(each.text) - 30), len(each.text)), "start") for each in plain]
        if max(starts) + width > 100:
            break
        possible = [each.can_return_to(start, local.size) for each, start in zip(plain, starts, strict=True)]
        held = [store.holds(slot, start) for slot, start in enumerate(starts)]
        assert held == possible, "neither silently stale nor refused in vain"
        if not all(held):
            with pytest.raises(ValueError, match="set it to 0 and prefill again"):
                store.reserve(0, starts, width)
            continue
        store.num_cached[:] = starts
        tokens = [[next(fresh) for _ in range(width)] for _ in range(2)]
        if on_device:
            store.open_at(0, torch.tensor(starts), width, store.reserve(0, starts, width))
        else:
            store.open(0, 2, width, torch.device("cpu"))
        columns = store.write(block, torch.tensor(tokens).float().view(2, 1, width, 1))
        for row, each in enumerate(plain):
            each.write(starts[row], tokens[row])
            for query in range(width):
                position = starts[row] + query
                first = max(0, position - local.size + 1)
                if local.is_chunked:
                    first = position // local.size * local.size
                assert attended(store, columns, local, row, query) == sorted(each.text[first : position + 1])


@pytest.mark.parametrize("start", [3, RING - 3, RING - 1, 2 * RING - 4])
def test_the_nodes_of_a_tree_go_around_the_ring(start: int) -> None:
    """A window of 3, shorter than the tree is deep: nodes see their ancestors and tokens within it, and are kept."""
    local = LocalAttention(3)
    branches = Branches((-1, 0, 0, 1, 2, 3, 4))
    store, size = RaggedCache(1, 1, 100, (local,)), 3 + SPARE
    block = torch.zeros(1, 1, size, 1)
    for first in range(0, start, 5):
        store.num_cached[0] = first
        store.open(0, 1, min(5, start - first), torch.device("cpu"))
        store.write(block, torch.arange(first, min(first + 5, start)).float().view(1, 1, -1, 1))
    store.num_cached[0] = start
    store.open(0, 1, 7, torch.device("cpu"), branches)
    columns = store.write(block, torch.arange(1000.0, 1007).view(1, 1, 7, 1))
    for node in range(7):
        path, each = [], node
        while each >= 0:
            path, each = [1000 + each, *path], branches.parents[each]
        assert attended(store, columns, local, 0, node) == ([*range(start), *path])[-3:]
    store.layers[0].keys, store.layers[0].values, store.layers[0].is_initialized = block, block.clone(), True
    store.keep(torch.tensor([start]), torch.tensor([[0, 2, 4, 6]]))
    assert [int(block[0, 0, (start + i) % size, 0]) for i in range(4)] == [1000, 1002, 1004, 1006]


# ---- sampling, and planted bugs

SHORT = 4  # tokens of the window, and of its spare columns


@cache
def sampled_pair() -> tuple[CausalLM, MarkovModel]:
    """A Mistral of three tokens with a short window, in float64, and a draft."""
    options = LONG | {"sliding_window": SHORT, "vocab_size": 3, "eos_token_id": None, "pad_token_id": None}
    target = CausalLM(make("mistral", options, torch.float64))
    return target, MarkovModel(torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2]]).double().div(4).expand(3, 3, 3))


SAMPLED_PROMPT = (1, 0, 2, 2, 1, 0, 0, 2, 1, 1)


@cache
def after(text: tuple[int, ...]) -> torch.Tensor:
    """The target's distribution by a plain forward."""
    with torch.inference_mode():
        return sampled_pair()[0].model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].softmax(-1)


def thresholds(emitted: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """All values at which a step with one draft token changes its outcome."""
    text = (*SAMPLED_PROMPT, *emitted)
    target, draft = after(text), sampled_pair()[1].table[text[-2], text[-1]]
    rest = (target - draft).clamp(min=0)
    finals = [target, rest / rest.sum(), *(after((*text, token)) for token in range(3))]
    return (
        pieces_between(draft.cumsum(0).tolist()),
        pieces_between((target / draft).tolist()),
        pieces_between(torch.cat([final.cumsum(0) for final in finals]).tolist()),
    )


def joint(num_tokens: int) -> dict[tuple[int, ...], float]:
    return {
        tokens: float(
            torch.stack([after((*SAMPLED_PROMPT, *tokens[:i]))[token] for i, token in enumerate(tokens)]).prod()
        )
        for tokens in itertools.product(range(3), repeat=num_tokens)
    }


@pytest.fixture
def short_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.models.state.windows._FEWEST_SPARE", SHORT)


@pytest.mark.usefixtures("short_spare")
def test_the_real_loop_samples_the_distribution_beyond_the_window() -> None:
    """By enumeration of every draw, at temperature 1, in a ring that the prompt has overwritten already."""
    make_decoder = maker(*sampled_pair(), 1, records=False)
    found = exact_distribution(make_decoder, SAMPLED_PROMPT, 3, thresholds)
    assert found == pytest.approx(joint(3), abs=1e-6)


@pytest.mark.usefixtures("short_spare")
@pytest.mark.parametrize("name", mutants.WINDOW_MUTANTS)
def test_a_window_mutant_is_caught_by_the_enumeration(name: str) -> None:
    make_decoder = mutants.WINDOW_MUTANTS[name](*sampled_pair(), 1, records=False)
    assert distance(exact_distribution(make_decoder, SAMPLED_PROMPT, 3, thresholds), joint(3)) > 0.01


@pytest.mark.usefixtures("short_spare")
@pytest.mark.parametrize("name", [None, *mutants.BROKEN_WINDOWS])
def test_a_window_mutant_is_caught_by_the_audit(name: str | None) -> None:
    """At temperature 1, by an audit that accuses a correct engine with probability at most 1e-6."""
    target, draft = sampled_pair()
    broken = mutants.with_window(mutants.BROKEN_WINDOWS[name])(target) if name else None
    sampling = SamplingParams(max_tokens=24)
    found = audit(
        ToyEngine(sampling, target, draft, speculative_target=broken),
        Reference(target, sampling, 64),
        [SAMPLED_PROMPT, (2, 1), (0, 0, 1, 2, 1)],
        num_draws=4000,
        batch_size=64,
        limits=AuditLimits(max_tv=0.3),
    )
    assert found.verdict == ("lossy" if name else "lossless"), found.reasons


@pytest.mark.parametrize("name", [None, *mutants.WINDOW_MUTANTS])
def test_a_window_mutant_is_caught_by_greedy_equality(name: str | None) -> None:
    """And the same decoder without the bug is not."""
    target = CausalLM(mistral())
    plant = mutants.WINDOW_MUTANTS[name] if name else maker
    decoder = plant(target, CausalLM(windowed("qwen3")), 3)(uniforms, verify_tokens, 3)
    sampling = SamplingParams(temperature=0, max_tokens=TWO_RINGS, ignore_eos=True)
    rows = decoder.run([Request(index, tuple(prompt), sampling) for index, prompt in enumerate(PROMPTS)])
    outputs = [row.output for row in sorted(rows, key=lambda row: row.request.index)]
    assert (outputs == [generated(mistral(), prompt) for prompt in PROMPTS]) == (name is None)


# ---- the trial when a model is loaded


@pytest.mark.parametrize("broken", [FewColumns, BySlot, lambda *local: LocalAttention(local[0] + 1)])
def test_the_trial_refuses_a_ring_that_loses_what_a_rollback_needs(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mistral()
    CausalLM(model)
    monkeypatch.setattr("specdec.models.causal.LocalAttention", broken)
    with pytest.raises(UnsupportedModelError, match=r"the logits of .* differ"):
        CausalLM(model)


def test_fused_layers_attend_to_their_windows() -> None:
    """Shapes that kernels take; layers of both kinds, also drafting with the first of them."""
    options = MIXED | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "use_sliding_window": True}
    model = make("qwen2", options)
    expected = [generated(model, prompt) for prompt in PROMPTS]
    assert fuse(model) == 3  # two layers and the head
    target = CausalLM(model)
    for method, choices in {
        "ngram": {},
        "early_exit": {"exit_layer": 1},
        "tree": {"draft": target, "tree": TREE},
    }.items():
        assert greedy(Engine(target, method=method, max_batch_size=3, **choices), PROMPTS) == expected, method


def test_layers_of_one_kind_with_different_windows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers gives them one mask."""
    model = windowed("qwen2", layer_types=["sliding_attention"] * 2)
    kinds = ["sliding_attention"] * 2, [{"sliding_window": WINDOW}, {"sliding_window": WINDOW + 1}]
    monkeypatch.setattr("specdec.models.causal.get_layer_types_and_kwargs", lambda config: kinds)
    with pytest.raises(UnsupportedModelError, match=r"Qwen2ForCausalLM has different windows in sliding_attention"):
        CausalLM(model)


def test_a_window_of_no_token_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0 of a window must be at least 1"):
        LocalAttention(0)


def test_the_wrapped_model_itself_stays_as_it_was() -> None:
    """GPT-Neo's own masks are replaced during our calls only."""
    model = windowed("gpt_neo")
    before = generated(model, PROMPTS[0])
    assert greedy(Engine(CausalLM(model), method="ngram"), [PROMPTS[0]]) == [before]
    assert generated(model, PROMPTS[0]) == before


def test_windows_are_read_from_the_options_of_transformers_5_17(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the options of all layers together, and has no entry for layers that share keys and values."""
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
    model = make("gemma3_text", GQA | kinds | {"sliding_window": 9})
    expected = CausalLM(model).local
    monkeypatch.setattr(
        "specdec.models.causal.get_layer_types_and_kwargs",
        lambda config: (config.layer_types[:2], {"sliding_window": config.sliding_window}),
    )
    assert expected == (LocalAttention(9), None, LocalAttention(9))
    assert CausalLM(model).local == expected
