"""Forward passes of heads that draft a block, by their definitions, and heads for targets whose runs are enumerated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from helpers import checkpoints
from helpers.heads import feed_forward, rms
from specdec.conformance.toys import QUARTERS
from specdec.heads import formats

Tensors = Mapping[str, Tensor]


def load(checkpoint: checkpoints.Checkpoint, folder: Path, model: Any) -> Any:
    """The head in a checkpoint, through the registry of formats."""
    found = formats.recognized(checkpoint.write(folder))
    assert found
    return found.load(model)


# ---- by definition


def hidden_states(
    tensors: Tensors, features: Tensor, block: Tensor, *, is_causal: bool = False, window: int | None = None
) -> Tensor:
    """Normalized states [n, width] of an embedded block [n, width] after features [m, ...] of the positions before."""
    context = rms(features @ tensors["fc.weight"].T, tensors["hidden_norm.weight"])
    x, num_layers = block, 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    for prefix in (f"layers.{index}." for index in range(num_layers)):
        normed = rms(x, tensors[f"{prefix}input_layernorm.weight"])
        inputs, after = _convolved(normed, tensors, f"{prefix}attention_conv.")
        x = x + after(_attended(inputs, context, tensors, f"{prefix}self_attn.", is_causal, window))
        normed = rms(x, tensors[f"{prefix}post_attention_layernorm.weight"])
        inputs, after = _convolved(normed, tensors, f"{prefix}mlp_conv.")
        x = x + after(feed_forward(inputs, tensors, f"{prefix}mlp."))
    return rms(x, tensors["norm.weight"])


def _attended(x: Tensor, context: Tensor, tensors: Tensors, prefix: str, is_causal: bool, window: int | None) -> Tensor:
    dim, num = checkpoints.HEAD_DIM, len(context)

    def heads(name: str, inputs: Tensor, first: int) -> Tensor:
        out = (inputs @ tensors[f"{prefix}{name}_proj.weight"].T).view(len(inputs), -1, dim)
        if name == "v":
            return out
        angles = (first + torch.arange(len(inputs)))[:, None, None] / 10_000.0 ** (torch.arange(0, dim, 2) / dim)
        low, high = rms(out, tensors[f"{prefix}{name}_norm.weight"]).chunk(2, -1)
        return torch.cat([low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()], -1)

    queries = heads("q", x, num)
    keys, values = (torch.cat([heads(name, context, 0), heads(name, x, num)]) for name in "kv")
    groups = queries.shape[1] // keys.shape[1]
    scores = torch.einsum("ihd,jhd->hij", queries, keys.repeat_interleave(groups, 1)) / dim**0.5
    own, places = num + torch.arange(len(x))[:, None], torch.arange(num + len(x))
    hidden = (places > own) & is_causal | (places <= own - (window or 10**9))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    attended = torch.einsum("hij,jhd->ihd", weights, values.repeat_interleave(groups, 1)).reshape(len(x), -1)
    return attended @ tensors[f"{prefix}o_proj.weight"].T


def _convolved(x: Tensor, tensors: Tensors, prefix: str) -> tuple[Tensor, Any]:
    """out[t, c] = sum over taps o of (base[o, c] + computed[t, o, group of c]) x[t - o, c], before and after."""
    if f"{prefix}base_kernel" not in tensors:
        return x, lambda outputs: outputs
    base = tensors[f"{prefix}base_kernel"]
    num_taps = base.shape[1]
    computed = (x @ tensors[f"{prefix}kernel_projection.weight"].T).view(len(x), 2, num_taps, -1)

    def convolve(y: Tensor, side: int) -> Tensor:
        weights = computed[:, side].repeat_interleave(y.shape[1] // computed.shape[-1], -1)
        return sum((base[side, tap] + weights[:, tap]) * pad(y, (0, 0, tap, 0))[: len(y)] for tap in range(num_taps))

    return convolve(x, 0), lambda outputs: convolve(outputs, 1)


def next_logits(kind: str, tensors: Tensors, model: Any, hidden: Tensor, text: list[int]) -> Tensor:
    """Logits [vocab] of the place with this hidden state [n, width]; text: the newest token and the drafted ones.

    hidden: of all drafting places up to this one, which is the last. DFlash2 halves its logits and caps them at 3.
    """
    embedded = model.get_input_embeddings().weight.detach()
    base = hidden[-1] @ tensors.get("lm_head.weight", model.get_output_embeddings().weight.detach()).T
    if kind == "dflash2":
        base = (base * 0.5 / 3).tanh() * 3
        parts = {name: tensors[f"candidate_selector.{name}"] for name in ("predecessor_codebook", "successor_codebook")}
        reads = parts["predecessor_codebook"][text[-1]] * (
            tensors["candidate_selector.hidden_projection.weight"] @ hidden[-1]
        )
        values, candidates = base.topk(5)
        scores = values + parts["successor_codebook"][candidates] @ reads
        return torch.full_like(base, -torch.inf).scatter(0, candidates, scores)
    if kind == "domino":
        gru = nn.GRU(checkpoints.WIDTH, len(tensors["prefix_gru.weight_hh_l0"]) // 3, bias=False)
        gru.load_state_dict({name.removeprefix("prefix_gru."): tensors[name] for name in tensors if "gru" in name})
        state = gru(embedded[torch.tensor(text)])[0][-1]
        narrow = silu(tensors["embed_proj.0.weight"] @ torch.cat([hidden[-1], state]))
        return base + tensors["embed_proj.2.weight"] @ narrow
    if kind.startswith("dspark"):
        return base + tensors["markov_head.markov_w2.weight"] @ _markov(kind, tensors, hidden, text)
    return base


def _markov(kind: str, tensors: Tensors, hidden: Tensor, text: list[int]) -> Tensor:
    before = tensors["markov_head.markov_w1.weight"][torch.tensor(text)]
    if kind == "dspark gated":
        weight, bias = (tensors[f"markov_head.gate_proj.{name}"] for name in ("weight", "bias"))
        return (weight @ torch.cat([hidden[-1], before[-1]]) + bias).sigmoid() * before[-1]
    if kind == "dspark rnn":
        weight, bias = (tensors[f"markov_head.joint_proj.{name}"] for name in ("weight", "bias"))
        state = torch.zeros(checkpoints.RANK)
        for place in range(len(text)):
            gate, candidate, out = (weight @ torch.cat([state, before[place], hidden[place]]) + bias).chunk(3)
            state = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh()
        return out.tanh()
    return before[-1]


# ---- for enumeration


def toy_target(vocab_size: int = 3) -> Any:
    """What a head borrows of a transformers model over a few tokens; the embedding has a row more, for masks."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab_size + 1, checkpoints.WIDTH, generator=generator).double()
    config = SimpleNamespace(vocab_size=vocab_size, hidden_size=checkpoints.WIDTH, num_hidden_layers=8)
    config.get_text_config = lambda decoder: config
    return SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        dtype=torch.float64,
        get_input_embeddings=lambda: SimpleNamespace(weight=weight),
        get_output_embeddings=lambda: SimpleNamespace(weight=weight.flip(0)[:vocab_size]),
    )


class OnGrid:
    """A BlockHead for FeatureTarget, whose distributions are rounded to quarters.

    A feature of the target is the code of two tokens; the head reads row `code` of a random table for it.
    """

    def __init__(self, head: Any, num_codes: int) -> None:
        self.head, generator = head, torch.Generator().manual_seed(3)
        self.table = torch.randn(num_codes, head.fc.in_features, generator=generator).double()
        for name in (
            *(
                "format",
                "drafting",
                "feature_layers",
                "draft_vocabulary",
                "vocab_size",
                "device",
                "rates",
                "max_tokens",
            ),
            *("allocate", "block", "block_at", "confidence"),
        ):
            setattr(self, name, getattr(head, name))

    def _features(self, features: Tensor) -> Tensor:
        return self.table[features.squeeze(-1).long().clamp(min=0)]

    def extend(self, features: Tensor, *rest: Any) -> None:
        self.head.extend(self._features(features), *rest)

    def extend_at(self, features: Tensor, *rest: Any) -> None:
        self.head.extend_at(self._features(features), *rest)

    def logits(self, *args: Any) -> Tensor:
        probs = self.head.logits(*args).softmax(-1)
        return QUARTERS[(probs.unsqueeze(-2) - QUARTERS).abs().sum(-1).argmin(-1)].log()
