"""Tiny checkpoints of drafting heads, targets with features for them, and heads whose distributions are on a grid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import QUARTERS, FeatureTarget, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.causal import CausalLM
from specdec.proposers.heads.eagle import EagleProposer
from specdec.trees.shape import Tree


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights, larger than usual, so that outputs depend on all of them; those of norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + float("norm" in name) for name, shape in shapes.items()
    }


def block_shapes(prefix: str, width: int, inputs: int, mlp: int = 48, heads: int = 4, kv_heads: int = 2, dim: int = 8):
    """Shapes of a decoder layer whose queries, keys and values are projections of `inputs` features."""
    shapes = {f"self_attn.{name}_proj.weight": (kv_heads * dim, inputs) for name in "kv"}
    shapes |= {"self_attn.q_proj.weight": (heads * dim, inputs), "self_attn.o_proj.weight": (width, heads * dim)}
    shapes |= {f"mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (width, mlp), "input_layernorm.weight": (width,)}
    return {prefix + name: shape for name, shape in (shapes | {"post_attention_layernorm.weight": (width,)}).items()}


class OnGrid(nn.Module):
    """A head for FeatureTarget whose distributions are rounded to the nearest of `rows`, to be enumerated.

    A feature of the target is the code of two tokens; the head reads row `code` of a random table for it.
    """

    def __init__(self, head: Any, num_codes: int, feature_size: int, rows: Tensor = QUARTERS) -> None:
        super().__init__()
        self.rows = rows
        self.head, self.feature_layers, self.format, self.drafting = (
            head,
            head.feature_layers,
            head.format,
            "sequential",
        )
        self.draft_vocabulary, self.vocab_size, self.device, self.rates = (
            *(head.draft_vocabulary, head.vocab_size, head.device),
            None,
        )
        self.table = torch.randn(num_codes, feature_size, generator=torch.Generator().manual_seed(3)).to(
            head.embedding.dtype
        )
        self.allocate, self.forward, self.forward_at = head.allocate, head.forward, head.forward_at

    def encode(self, features: Tensor) -> Tensor:
        return self.head.encode(self.table[features.squeeze(-1).long().clamp(min=0)])

    def logits(self, states: Tensor) -> Tensor:
        probs = self.head.logits(states).softmax(-1).double()
        return self.rows[(probs.unsqueeze(-2) - self.rows).abs().sum(-1).argmin(-1)].log()


def rms(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Root mean square normalization by its definition."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def attend(x: Tensor, tensors: Mapping[str, Tensor], prefix: str, dim: int, theta: float = 10_000.0) -> Tensor:
    """Causal attention with rotary positions 0, 1, ... by its definition: [n, inputs] -> [n, width]."""

    def project(name: str) -> Tensor:
        out = x @ tensors[f"{prefix}{name}_proj.weight"].T + tensors.get(f"{prefix}{name}_proj.bias", torch.zeros(()))
        heads = out.view(len(x), -1, dim)
        norm = tensors.get(f"{prefix}{name}_norm.weight")
        return heads if norm is None else rms(heads, norm)

    def turned(heads: Tensor) -> Tensor:
        angles = torch.arange(len(x))[:, None, None] / theta ** (torch.arange(0, dim, 2) / dim)
        low, high = heads.chunk(2, -1)
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)

    queries, keys, values = turned(project("q")), turned(project("k")), project("v")
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (each.repeat_interleave(groups, 1) for each in (keys, values))
    scores = torch.einsum("ihd,jhd->hij", queries, keys) / dim**0.5
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -torch.inf)
    attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values).reshape(len(x), -1)
    return attended @ tensors[f"{prefix}o_proj.weight"].T + tensors.get(f"{prefix}o_proj.bias", torch.zeros(()))


def feed_forward(x: Tensor, tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    """Llama's gated MLP by its definition."""
    gate, up = (x @ tensors[f"{prefix}{name}_proj.weight"].T for name in ("gate", "up"))
    return (nn.functional.silu(gate) * up) @ tensors[f"{prefix}down_proj.weight"].T


def check_chain_is_lossless(head: Any, feature_size: int) -> None:
    """Assert that the joint distribution of 3 tokens is the target's, drafted by a sequential head for 3 token ids."""
    markov, prompt = FeatureTarget(table(0)), (0, 1, 2, 0)
    on_grid = OnGrid(head, 9, feature_size)

    def make(source: Any, rule: Any, max_batch_size: int) -> Decoder:
        proposer = EagleProposer(on_grid, source)
        return Decoder(markov, proposer, 2, max_batch_size=max_batch_size, rule=rule, uniforms=source)

    assert distance(exact_distribution(make, prompt, 3, (4, 2, 4)), joint_distribution(markov, prompt, 3)) < 1e-12


_PROMPTS, _GREEDY = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4] * 8], SamplingParams(temperature=0, max_tokens=48)


def plain_greedy(model: Any) -> list[tuple[int, ...]]:
    """Greedy outputs of a transformers model without speculation, for `check_greedy_is_lossless`."""
    return [each.token_ids for each in Engine(CausalLM(model), max_batch_size=3).generate(_PROMPTS, _GREEDY)]


def check_greedy_is_lossless(model: Any, head: Any, method: str, expected: list[tuple[int, ...]]) -> None:
    """Assert that a head's greedy outputs, in ragged rows, are those of `plain_greedy`, and that it drafts."""
    options: dict[str, Any] = {"tree": Tree.balanced([2, 2, 1])} if method == "tree" else {"num_speculative_tokens": 3}
    engine = Engine(CausalLM(model), method=method, draft=head, max_batch_size=3, **options)
    found = engine.generate(_PROMPTS, _GREEDY)
    assert [each.token_ids for each in found] == expected
    assert sum(each.counts.num_drafted for each in found) > 60
