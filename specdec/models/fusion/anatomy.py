"""What the decoder layers of transformers consist of, whatever an architecture calls it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# architectures whose layers have the parts of an `Anatomy` and no others
_ARCHITECTURES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Granite", "Phi3")
FUSABLE = tuple(f"{name}DecoderLayer" for name in _ARCHITECTURES)
BODIES = (*(f"{name}Model" for name in _ARCHITECTURES), "Gemma3TextModel")
NORMS = tuple(f"{name}RMSNorm" for name in _ARCHITECTURES)


_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "NewGELUActivation": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Norms:
    """The norms of a layer; None for missing ones.

    after_attention, after_mlp: of the outputs of attention and MLP, before the residual is added.
    """

    before_attention: nn.Module | None
    after_attention: nn.Module | None
    before_mlp: nn.Module | None
    after_mlp: nn.Module | None
    queries: nn.Module | None
    keys: nn.Module | None


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a decoder layer.

    qkv: the projections to queries, keys and values, or one to all. gate_up: likewise.
    scaling: of the products of queries and keys. softcap: c for attention scores c * tanh(score / c), or None.
    residual_scale: of the outputs of attention and MLP when they are added to the residual stream.
    layer_type: the kind of the layer, which selects a rotary embedding and a mask where these differ, or None.
    """

    index: int
    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    norms: Norms
    activation: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    softcap: float | None
    residual_scale: float
    layer_type: str | None

    @property
    def activation_name(self) -> str | None:
        """ "silu" or "gelu_tanh", or None for others."""
        return _ACTIVATIONS.get(type(self.activation).__name__)

    @classmethod
    def of(cls, layer: Any) -> Anatomy:
        """The anatomy of a transformers layer of one of the `FUSABLE` classes, or of one with its parts."""
        attention, mlp = layer.self_attn, layer.mlp
        qkv, head_dim = _parts(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"), attention.head_dim
        num_heads = attention.o_proj.in_features // head_dim
        return cls(
            index=attention.layer_idx,
            qkv=qkv,
            output=attention.o_proj,
            gate_up=_parts(mlp, "gate_up_proj", "gate_proj", "up_proj"),
            down=mlp.down_proj,
            norms=_norms(layer),
            activation=getattr(mlp, "act_fn", None) or mlp.activation_fn,
            num_heads=num_heads,
            num_kv_heads=(sum(part.out_features for part in qkv) // head_dim - num_heads) // 2,
            head_dim=head_dim,
            scaling=attention.scaling,
            softcap=getattr(attention, "attn_logit_softcapping", None),
            residual_scale=getattr(layer, "residual_multiplier", 1.0),
            layer_type=getattr(attention, "layer_type", None),
        )


def is_fusable(layer: Any) -> bool:
    """Whether a module is a decoder layer that `FusedLayer` computes."""
    return type(layer).__name__ in FUSABLE and _rotates_whole_heads(layer.self_attn.config)


def _rotates_whole_heads(config: Any) -> bool:
    rope = config.rope_parameters or {}
    factors = (rope.get("partial_rotary_factor", 1.0), getattr(config, "partial_rotary_factor", 1.0))
    return all(factor == 1.0 for factor in factors)


def _parts(module: Any, joined: str, *single: str) -> tuple[nn.Linear, ...]:
    """The projection of this name if the module has it, else those of the other names."""
    return (getattr(module, joined),) if hasattr(module, joined) else tuple(getattr(module, name) for name in single)


def _norms(layer: Any) -> Norms:
    """With a norm before the MLP of its own name, the one named after the attention is of the attention's output."""
    attention = layer.self_attn
    has_four = hasattr(layer, "pre_feedforward_layernorm")
    return Norms(
        before_attention=layer.input_layernorm,
        after_attention=layer.post_attention_layernorm if has_four else None,
        before_mlp=layer.pre_feedforward_layernorm if has_four else layer.post_attention_layernorm,
        after_mlp=layer.post_feedforward_layernorm if has_four else None,
        queries=getattr(attention, "q_norm", None),
        keys=getattr(attention, "k_norm", None),
    )
