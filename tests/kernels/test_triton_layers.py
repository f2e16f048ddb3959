"""Triton kernels for decode steps, against float64 and against the layers that they replace.

On a GPU they run there; without one in the interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_triton_layers.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.tiny import GQA, GREEDY, PROMPTS, make, reference

from specdec import Engine
from specdec.heads.eagle import new_head
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.models.fusion import FusedDecoder, Norm, fuse
from specdec.models.state import windows
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton: pip install triton==3.6.0")

from specdec.kernels import triton_layers  # noqa: E402  # only where it can be imported

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDE = GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 1024}
ONE_LOCAL = WIDE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9}
CAPPED = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
KINDS = {
    "llama 32": WIDE,
    "llama 8": GQA | {"max_position_embeddings": 1024},
    "mistral 64, one key/value head": WIDE | {"head_dim": 64, "num_key_value_heads": 1, "sliding_window": None},
    "qwen2 24, with biases": WIDE | {"head_dim": 24},
    "qwen3 96, with norms of q and k": WIDE | {"head_dim": 96},
    "llama 128, all biases": WIDE | {"head_dim": 128, "attention_bias": True, "mlp_bias": True},
    "gemma3_text 32, one local layer": ONE_LOCAL | {"query_pre_attn_scalar": 24},
    "gemma2 256, capped": ONE_LOCAL | {"head_dim": 256, "num_key_value_heads": 1} | CAPPED,
    "granite 32, scaled": WIDE | {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "llama 32, 20 heads of one group": WIDE | {"hidden_size": 80, "num_attention_heads": 20, "num_key_value_heads": 1},
}
FEW = ("llama 32", "qwen3 96, with norms of q and k")  # kinds that stand for all where the dtype is what matters
# compiling takes most of the time on a GPU, which uses bfloat16; the interpreter takes its time for each kind alike
CASES = [
    *((kind, torch.bfloat16 if ON_GPU else torch.float32) for kind in KINDS),
    *(
        (kind, dtype)
        for kind in (FEW if ON_GPU else FEW[:1])
        for dtype in (torch.float16, torch.float32, torch.bfloat16)
    ),
]
CASES = list(dict.fromkeys(CASES))


def build(kind: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    name = kind.split()[0].strip(",")
    return make(name, KINDS[kind], dtype, "eager" if name == "gemma2" else "sdpa")


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 16 places and rings of 17 columns, so that the slow interpreter sees several of them."""
    if not ON_GPU:
        monkeypatch.setattr(triton_layers, "_SPLIT_BYTES", 1)
        monkeypatch.setattr(windows, "_FEWEST_SPARE", 8)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), 1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "num_inputs", "num_outputs", "dtype"),
    [
        *((*shape, torch.bfloat16) for shape in [(1, 64, 96), (5, 100, 33), (35, 300, 70)]),
        *((5, 100, 33, dtype) for dtype in (torch.float16, torch.float32)),
    ],
)
def test_products(num_tokens: int, num_inputs: int, num_outputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    x, tolerance = random(num_tokens, num_inputs) * 3, TOLERANCES[dtype]
    weight, bias, norm = random(num_outputs, num_inputs), random(num_outputs), random(num_outputs)
    residual, both = random(num_tokens, num_outputs) * 5, random(2 * num_inputs, num_outputs) / 10
    assert error(triton_layers.product(x, weight), x.double() @ weight.double().T) < tolerance
    states, normed = triton_layers.added_product(x, weight, bias, residual, norm, 1e-5)
    expected = x.double() @ weight.double().T + bias.double() + residual.double()
    assert error(states, expected) < tolerance
    both_biases = random(2 * num_inputs)
    gate, up = (rms(expected, norm) @ both.double().T + both_biases.double()).chunk(2, -1)
    gelu = partial(torch.nn.functional.gelu, approximate="tanh")
    for name, activation in (("silu", torch.nn.functional.silu), ("gelu_tanh", gelu)):
        actual = triton_layers.product(normed, both, both_biases, activation=name)
        assert error(actual, activation(gate) * up) < tolerance
    normed = triton_layers.normed_states(residual, norm, 1e-5)
    assert error(triton_layers.product(normed, both), rms(residual, norm) @ both.double().T) < tolerance
    assert error(triton_layers.rms_norm(residual, norm, 1e-5), rms(residual, norm)) < tolerance


def test_interleaved_outputs_come_back_in_order() -> None:
    rows = torch.arange(3 * 48).view(3 * 48, 1).expand(-1, 2)
    stored = triton_layers.interleaved(rows, 48)
    assert not torch.equal(stored, rows)
    assert stored[:17, 0].tolist() == [*range(8), *range(24, 32), 8]  # what is turned together is near
    assert torch.equal(triton_layers.deinterleaved(stored[:, 0], 48), rows[:, 0])


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_layers_are_those_of_the_original(kind: str, dtype: torch.dtype) -> None:
    """Ragged rows across splits of the context, after a rollback, into a cache that is then full.

    In half precision as near to the same model in float64 as transformers' own layers are.
    """
    plain, fused = (build(kind, dtype).to(DEVICE) for _ in range(2))
    fuse(fused)
    assert isinstance(fused.model, FusedDecoder)
    torch.manual_seed(1)
    tokens = torch.randint(3, 61, (3, 300), device=DEVICE)
    full, middle = (297, 130) if ON_GPU else (33, 5)
    lm, starts = CausalLM(fused), [full, middle, 1]
    cache = lm.allocate(3, full + 3)
    for slot, start in enumerate(starts):
        cache.num_cached[slot] = 0
        lm.forward(tokens[slot : slot + 1, : min(full + 3, start + 7)], cache, first_slot=slot)
    cache.num_cached[:] = starts
    actual = lm.forward(torch.stack([row[start : start + 3] for row, start in zip(tokens, starts, strict=True)]), cache)
    unfused = logits_behind(plain, tokens, starts)
    expected = logits_behind(plain.double(), tokens, starts)
    allowed = 3 * TOLERANCES[dtype] if dtype == torch.float32 else 1.5 * error(unfused, expected)
    assert error(actual, expected) < allowed


@torch.inference_mode()
def logits_behind(model, tokens: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Of the three tokens after each start of a row, without a cache."""
    rows = [row[None, : start + 3] for row, start in zip(tokens, starts, strict=True)]
    return torch.cat([model(row, use_cache=False).logits[:, -3:] for row in rows])


@pytest.mark.parametrize("kind", [*FEW, "llama 32, 20 heads of one group"] if ON_GPU else FEW[:1])
def test_a_node_of_a_tree_is_the_token_of_a_chain(kind: str) -> None:
    model = build(kind).to(DEVICE)
    fuse(model)
    lm = CausalLM(model)
    torch.manual_seed(1)
    text, tree = torch.randint(3, 61, (140,)).tolist(), Tree(((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0)))
    nodes = [7, 8, 9, 10, 11, 12]
    for length in (1, 63, 127, 128, 140) if ON_GPU else (1, 30):
        cache = lm.allocate(1, length + len(nodes))
        if length > 1:
            lm.forward(torch.tensor([text[: length - 1]], device=DEVICE), cache)
        cache.num_cached[0] = length - 1
        fed = torch.tensor([[text[length - 1], *nodes]], device=DEVICE)
        logits = lm.forward(fed, cache, branches=Branches.after_root(tree.parents))[0]
        for node in range(len(nodes)):
            way = [*text[:length], *(nodes[i] for i in tree.lineage(node))]
            chain = lm.allocate(1, len(way))
            lm.forward(torch.tensor([way[: length - 1] or way[:1]], device=DEVICE), chain)
            chain.num_cached[0] = length - 1
            expected = lm.forward(torch.tensor([way[length - 1 :]], device=DEVICE), chain)[0, -1]
            assert_same(logits[node + 1], expected)


@pytest.mark.parametrize("kind", FEW if ON_GPU else ["llama 8"])
def test_features_are_the_hidden_states_of_transformers(kind: str) -> None:
    """Of a ragged step and of a tree's nodes; a neighboring layer is seen; the logits keep their bits."""
    name, options = kind.split()[0].strip(","), KINDS[kind] | {"num_hidden_layers": 3}
    plain, fused = (make(name, options).to(DEVICE) for _ in range(2))
    fuse(fused)
    lm, layers, starts = CausalLM(fused), (2, FINAL, 1, 0, 3), [150, 2] if ON_GPU else [5, 1]
    torch.manual_seed(1)
    tokens = torch.randint(3, 61, (2, starts[0] + 3), device=DEVICE)
    fed = torch.stack([row[start : start + 3] for row, start in zip(tokens, starts, strict=True)])
    tree = Branches.after_root((-1, -1))  # the second node follows the root, too
    for branches, columns in ((None, [0, 1, 2]), (tree, [0, 2])):
        logits, caches = [], [lm.allocate(2, starts[0] + 3, features=each) for each in ((), layers)]
        for cache in caches:
            for slot, start in enumerate(starts):
                lm.forward(tokens[slot : slot + 1, :start], cache, first_slot=slot)
                cache.num_cached[slot] = start
            logits.append(lm.forward(fed, cache, branches=branches))
        assert_same(*logits)
        for slot, start in enumerate(starts):
            text = torch.cat([tokens[slot, :start], fed[slot, columns]])
            states, before_norm = hidden_states(plain, text)
            wanted = (states[2], states[-1], states[1], states[0], before_norm)
            of_text = caches[1].features[slot, [*range(start), *(start + column for column in columns)]]
            for index, actual in enumerate(of_text.chunk(len(layers), -1)):
                found = [error(actual, each) < 1e-5 for each in wanted]
                assert found == [place == index for place in range(len(layers))]


@torch.inference_mode()
def hidden_states(model, text: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """transformers' hidden states of a text, [tokens, hidden] each, and the last layer's output before the norm."""
    before_norm = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0][0]))
    states = model(text.unsqueeze(0), use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    return [each[0] for each in states], before_norm[0]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit-identical; the interpreter's own products have no order of sums, so there nearly."""
    if ON_GPU:
        assert torch.equal(actual, expected)
    else:
        assert error(actual, expected) < 2e-6


@pytest.mark.skipif(not ON_GPU, reason="the order of sums is the hardware's: needs a GPU")
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_token_does_not_depend_on_its_neighbours(kind: str, dtype: torch.dtype) -> None:
    """The same bits however many tokens a call has, whatever the rows beside it hold."""
    model = build(kind, dtype).to(DEVICE)
    fuse(model)
    lm = CausalLM(model)
    torch.manual_seed(1)
    tokens = torch.randint(3, 61, (3, 200), device=DEVICE)
    alone = torch.cat([step for _, step in in_pieces(lm, tokens[:1], 1, [0])], 1)
    for width in (2, 5, 9, 16, 33, 64):
        pieces = torch.cat([step for _, step in in_pieces(lm, tokens, width, [0, 7, 11])], 1)
        assert torch.equal(pieces[:1], alone)


def in_pieces(lm: CausalLM, tokens: torch.Tensor, width: int, starts: list[int]):
    cache = lm.allocate(len(tokens), tokens.shape[1] + max(starts))
    cache.num_cached[:] = starts
    for start in range(0, tokens.shape[1], width):
        piece = tokens[:, start : start + width]
        yield start, lm.forward(piece, cache)
        cache.num_cached[:] = [length + piece.shape[1] for length in cache.num_cached]


@pytest.mark.parametrize("kind", ["llama 8", FEW[1]] if ON_GPU else ["llama 8"])
def test_greedy_tokens_are_those_of_transformers(kind: str) -> None:
    model = build(kind)
    prompts, sampling = (PROMPTS, GREEDY) if ON_GPU else (PROMPTS[:2], replace(GREEDY, max_tokens=6))
    expected = [reference(model, prompt)[: sampling.max_tokens] for prompt in prompts]
    model = model.to(DEVICE)
    head = new_head(model, torch.arange(0, 61, 2, device=DEVICE)).placed(model.device, model.dtype).eval()
    head.requires_grad_(False)
    fuse(model)
    head.fuse()
    assert head._stack is not None
    methods = (("tree", head), ("autoregressive", None), ("ngram", None), ("eagle", head))
    for method, draft in methods if ON_GPU else methods[:2]:
        engine = Engine(CausalLM(model), method=method, draft=draft, max_batch_size=3, num_speculative_tokens=4)
        completions = engine.generate(prompts, sampling)
        assert [list(c.token_ids) for c in completions] == expected


def test_norm_modules_use_the_kernel() -> None:
    norm = torch.nn.RMSNorm(48, eps=1e-5).to(DEVICE).requires_grad_(False)
    norm.variance_epsilon = norm.eps
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 48, device=DEVICE)
    module = Norm(norm)
    assert module.on_gpu
    assert error(module(x), rms(x, norm.weight)) < 2e-6


@pytest.mark.parametrize(
    ("num_tokens", "shared_bytes", "expected"),
    [
        *((1, 232_448, (16, 4)), (16, 232_448, (16, 4)), (17, 232_448, (32, 4)), (33, 232_448, (64, 3))),
        *((1, 101_376, (16, 2)), (40, 101_376, (16, 2)), (40, 166_912, (64, 2))),
    ],
)
def test_programs_fit_into_shared_memory(num_tokens: int, shared_bytes: int, expected: tuple[int, int]) -> None:
    """Gates and others, 64 outputs each, by 128 inputs in 16 bits: an H100, an RTX 5090 and an A100."""
    blocks = triton_layers.Blocks(64, 128, 4, 4)
    assert triton_layers._pipeline(num_tokens, blocks, 2 * 128, 2 * 2 * 64 * 128, shared_bytes) == expected
