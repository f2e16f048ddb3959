"""Fused layers with sliding windows, whose keys and values are in rings: across their wrap, and bit by bit."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.tiny import GQA

from specdec import Engine, SamplingParams
from specdec.kernels import cpp
from specdec.models.base import prefill
from specdec.models.causal import CausalLM
from specdec.models.fusion import FusedDecoder, fuse, stacks
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree

pytestmark = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)
WIDE = GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 4200}
ONE_LOCAL = WIDE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
CAPPED = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}
KINDS = {
    "gemma3_text, one key/value head of 256": ONE_LOCAL | {"head_dim": 256, "num_key_value_heads": 1},
    "gemma2, capped": ONE_LOCAL | CAPPED,
    "mistral, all layers": WIDE | {"sliding_window": 24},
    "qwen2, one layer": ONE_LOCAL | {"use_sliding_window": True},
}
GEMMAS = [kind for kind in KINDS if kind.startswith("gemma")]
DTYPES = [torch.float32, torch.bfloat16]
LENGTH = 400  # tokens: the rings of windows of 16 and 24 have 144 and 152 columns


def make(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """A model whose weights do not amplify roundings over a long context."""
    name = kind.split(",")[0]
    model = tiny.make(name, KINDS[kind], dtype, "eager" if name == "gemma2" else "sdpa")
    for weight in model.parameters():
        weight.data *= 0.5 if weight.ndim > 1 else 1
    return model


def fused(kind: str, dtype: torch.dtype) -> CausalLM:
    model = make(kind, dtype)
    fuse(model)
    assert isinstance(model.model, FusedDecoder)
    return CausalLM(model)


def text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_transformers(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 as near to the float32 model as transformers' own layers are; one position more would be seen."""
    exact, plain, lm = make(kind, torch.float32), make(kind, dtype), fused(kind, dtype)
    tokens, wider = text(1, LENGTH), lm.allocate(1, LENGTH)
    with torch.inference_mode():
        expected = exact.to(dtype).float()(tokens, use_cache=False).logits
        by_transformers = plain(tokens, use_cache=False).logits
        by_fused = lm.forward(tokens, lm.allocate(1, LENGTH))
        monkeypatch.setattr(stacks, "_window", lambda cache, index: cache.local[index] and cache.local[index].size + 1)
        one_more = lm.forward(tokens, wider)
    error, own, off_by_one = (
        float((logits.float() - expected).norm() / expected.norm()) for logits in (by_transformers, by_fused, one_more)
    )
    assert own < (1e-5 if dtype == torch.float32 else 1.1 * error) < off_by_one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_does_not_depend_on_its_neighbours_across_the_wrap(kind: str, dtype: torch.dtype) -> None:
    """The same bits at every width up to 16 and in batches up to 32, whatever the rows beside it hold."""
    lm, tokens = fused(kind, dtype), text(32, LENGTH)
    whole = lm.forward(tokens[:1], lm.allocate(1, LENGTH))
    for width in range(1, 17):
        rows, start = (1, 2, 3, 32)[width % 4], LENGTH - 64  # of the steps; the prompt is read in pieces before them
        cache, pieces = lm.allocate(rows, LENGTH + 40), []
        for slot in range(rows):
            prefill(lm, tokens[slot, : start + slot].tolist(), cache, slot)
        while start < LENGTH:
            fed = torch.stack([row[start + slot :][:width] for slot, row in enumerate(tokens[:rows].repeat(1, 2))])
            pieces.append(lm.forward(fed[:, : LENGTH - start], cache)[:1])
            start += pieces[-1].shape[1]
            cache.num_cached[:] = [start + slot for slot in range(rows)]
        assert torch.equal(torch.cat(pieces, 1), whole[:, LENGTH - 64 :])


@pytest.mark.parametrize("kind", GEMMAS)
def test_a_long_prompt_is_bit_identical_to_its_steps(kind: str) -> None:
    """4,096 tokens as one prompt, in other chunks, and as the last ones one by one and five at a time."""
    lm, tokens, length = fused(kind, torch.bfloat16), text(1, 4096), 4096
    whole = lm.forward(tokens, lm.allocate(1, length))
    for width, start in ((1000, 0), (1, length - 20), (5, length - 40)):
        cache, pieces = lm.allocate(1, length), []
        if start:
            prefill(lm, tokens[0, :start].tolist(), cache, 0)
        while start < length:
            cache.num_cached[:] = [start]
            pieces.append(lm.forward(tokens[:, start : start + width], cache))
            start += pieces[-1].shape[1]
        steps = torch.cat(pieces, 1)
        assert torch.equal(steps, whole[:, -steps.shape[1] :])


@pytest.mark.parametrize("kind", GEMMAS)
def test_a_node_of_a_tree_is_bit_identical_to_a_chain_across_the_wrap(kind: str) -> None:
    lm, tokens = fused(kind, torch.bfloat16), text(200).tolist()
    tree, nodes = Tree(((0,), (1,), (0, 0), (1, 0), (1, 1), (1, 1, 0))), [7, 8, 9, 10, 11, 12]
    for length in (20, 141, 142, 143, 144, 145, 190):  # the ring's last column is 143
        cache = lm.allocate(1, 240)
        prefill(lm, tokens[: length - 1], cache, 0)
        fed = torch.tensor([[tokens[length - 1], *nodes]])
        logits = lm.forward(fed, cache, branches=Branches.after_root(tree.parents))[0]
        for node in range(len(nodes)):
            path = [*tokens[:length], *(nodes[i] for i in tree.lineage(node))]
            assert torch.equal(logits[node + 1], prefill(lm, path, lm.allocate(1, 240), 0)[0, -1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GEMMAS)
def test_speculation_gives_the_tokens_of_plain_decoding_across_the_wrap(kind: str, dtype: torch.dtype) -> None:
    lm, prompts = fused(kind, dtype), [text(length, seed=length).tolist() * 2 for length in (65, 3, 40)]
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    plain = Engine(lm).generate(prompts, sampling)
    drafted = Engine(lm, method="ngram", num_speculative_tokens=5, max_batch_size=3).generate(prompts, sampling)
    assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
    assert sum(c.counts.num_drafted for c in drafted) > 5
