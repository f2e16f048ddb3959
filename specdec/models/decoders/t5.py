"""The decoders of the T5 family, run layer by layer: transformers gives all rows the same relative position biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from specdec.models.decoders.base import KeysValues
from specdec.models.state.ragged import RaggedCache


class T5Decoder:
    """The decoder of a T5, T5 1.1, Flan-T5, mT5, UMT5, LongT5 or Switch Transformers model; see `Decoder`."""

    context_length = 1 << 30  # positions are relative; quality may still degrade for long outputs

    def __init__(self, model: PreTrainedModel, layers: Sequence[_Layer]) -> None:
        self.model, self.config, self._layers = model, model.config, layers
        self.num_layers = len(layers)
        self._biases = [_biases_by_distance(layer.own) for layer in layers]

    def encode(self, prompt: Tensor) -> list[KeysValues]:
        encoded = self.model.encoder(input_ids=prompt).last_hidden_state
        return [
            (self._heads(layer.cross.k(encoded))[0], self._heads(layer.cross.v(encoded))[0]) for layer in self._layers
        ]

    def logits(
        self, tokens: Tensor, cache: RaggedCache, prompts: Sequence[KeysValues], mask: Tensor, keep: int | Tensor
    ) -> Tensor:
        hidden = self._decode(tokens, cache, prompts, mask)
        return self._head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])

    def _decode(self, tokens: Tensor, cache: RaggedCache, prompts: Sequence[KeysValues], mask: Tensor) -> Tensor:
        """Hidden states after the final norm, [rows, width, hidden]."""
        hidden, own = self.model.decoder.embed_tokens(tokens), cache.mask(mask.dtype)
        distances = cache.window.positions.unsqueeze(-1) - cache.seen_positions()
        bias = own
        for index, (layer, biases) in enumerate(zip(self._layers, self._biases, strict=True)):
            if biases is not None:  # in most models the first layer's serve all
                bias = biases[distances.clamp(0, len(biases) - 1)].permute(0, 3, 1, 2) + own
            hidden = self._own_attention(layer, index, hidden, bias, cache)
            hidden = self._cross_attention(layer, hidden, mask, prompts[index])
            hidden = _clamped(layer.feed_forward(hidden))
        normed: Tensor = self.model.decoder.final_layer_norm(hidden)
        return normed

    def _own_attention(self, layer: _Layer, index: int, hidden: Tensor, bias: Tensor, cache: RaggedCache) -> Tensor:
        normed = layer.own_norm(hidden)
        own = layer.own
        states = [self._heads(project(normed)) for project in (own.q, own.k, own.v)]
        keys, values = cache.update(states[1], states[2], index)
        attended: Tensor = own.o(_attended(states[0], keys, values, bias))
        return _clamped(hidden + attended)

    def _cross_attention(self, layer: _Layer, hidden: Tensor, mask: Tensor, prompts: KeysValues) -> Tensor:
        queries = self._heads(layer.cross.q(layer.cross_norm(hidden)))
        attended: Tensor = layer.cross.o(_attended(queries, *prompts, mask))
        return _clamped(hidden + attended)

    def _heads(self, states: Tensor) -> Tensor:
        """[rows, width, heads * head_dim] -> [rows, heads, width, head_dim]."""
        return states.view(*states.shape[:-1], self.config.num_heads, self.config.d_kv).transpose(1, 2)

    def _head(self, hidden: Tensor) -> Tensor:
        config = self.config
        scales_if_tied = config.model_type in ("umt5", "switch_transformers")  # these have no name for it
        if getattr(config, "scale_decoder_outputs", scales_if_tied and config.tie_word_embeddings):
            hidden = hidden * config.d_model**-0.5
        logits: Tensor = self.model.lm_head(hidden)
        return logits


@dataclass(frozen=True, slots=True)
class _Layer:
    """The modules of one decoder layer: attention to itself, to the prompt, and what follows, with their norms."""

    own: Any
    own_norm: Any
    cross: Any
    cross_norm: Any
    feed_forward: Any


def t5_decoder(model: PreTrainedModel) -> T5Decoder | None:
    """The decoder of a model whose layers are T5's; None for any other."""
    try:
        parts = [block.layer for block in model.decoder.block]
        layers = [
            _Layer(own.SelfAttention, own.layer_norm, cross.EncDecAttention, cross.layer_norm, feed_forward)
            for own, cross, feed_forward in parts
        ]
    except (AttributeError, ValueError):
        return None
    return T5Decoder(model, layers)


def _biases_by_distance(attention: Any) -> Tensor | None:
    """What a layer adds to attention scores by how far back a key is, [max_distance + 1, heads], if it does.

    The last one is for all that is further back.
    """
    if not attention.has_relative_attention_bias:
        return None
    num_buckets, most = attention.relative_attention_num_buckets, attention.relative_attention_max_distance
    biases: Tensor = attention.relative_attention_bias(
        distance_buckets(num_buckets, most).to(attention.q.weight.device)
    )
    return biases.detach()


def distance_buckets(num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance back, 0 ... max_distance, int64 [max_distance + 1].

    Half of the buckets are for one distance each; the others grow with its logarithm, up to max_distance.
    Source: Raffel et al. 2020 (arXiv:1910.10683), section 2.1; rounding is that of float32, as in the models' training.
    """
    exact = num_buckets // 2
    distances = torch.arange(max_distance + 1)
    growth = torch.log(distances.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    wide = exact + (growth * (num_buckets - exact)).long()
    return torch.where(distances < exact, distances, wide.clamp(max=num_buckets - 1))


def _attended(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention without T5's missing scale, [rows, heads, width, head_dim] -> [rows, width, heads * head_dim]."""
    attended = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
    return attended.transpose(1, 2).flatten(2)


def _clamped(hidden: Tensor) -> Tensor:
    """Hidden states as transformers keeps them from overflowing in float16, which T5's do."""
    if hidden.dtype != torch.float16:
        return hidden
    most = torch.finfo(torch.float16).max
    limit = torch.where(hidden.isinf().any(), most - 1000, most)
    return hidden.clamp(min=-limit, max=limit)
