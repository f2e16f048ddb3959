"""Encoder-decoder models of the T5 family as `LanguageModel`s: the encoder reads the prompt.

A row's tokens are its prompt and its output, as for any model, and the last prompt token stands for the decoder's start
token. For a prompt of n tokens, token i is thus at decoder position i - (n - 1), and the loop, proposers and
verification work unchanged. Besides the decoder's keys and values, a slot holds those of the encoded prompt, which are
computed once.

The decoder layers are run here because transformers uses the same relative position biases for all rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from specdec.models.base import FeatureLayers, LanguageModel
from specdec.models.causal import UnsupportedModelError, check_logits, check_tree_equals_plain, eos_token_ids
from specdec.models.fusion import weight_bytes
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches


@dataclass(slots=True, eq=False)
class Seq2SeqCache:
    """What an encoder-decoder remembers of each slot.

    decoder: keys and values of the decoder's own tokens. prompts: by layer, keys and values of the encoded prompts,
    [slots, heads, capacity, head_dim] each. prompt_lengths: their numbers of tokens, int64 [slots], and `num_prompt`
    the same on the host; 1 where nothing was read. num_cached: valid tokens per slot, the prompt's included.
    """

    decoder: RaggedCache
    prompts: list[tuple[Tensor, Tensor]]
    prompt_lengths: Tensor
    capacity: int
    features: Tensor | None = None
    num_prompt: list[int] = field(init=False)
    num_cached: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt, self.num_cached = [1] * len(self.prompt_lengths), [0] * len(self.prompt_lengths)

    @property
    def max_width(self) -> int:
        """The most tokens per row of one call."""
        return self.decoder.max_width

    def reserve(self, first_slot: int, starts: Sequence[int], width: int) -> int:
        """A bound on the lengths after a call that starts at these, one of few, so that few shapes occur."""
        return self.decoder.extent_for(max(starts) + width)

    def holds(self, slot: int, num_tokens: int) -> bool:
        """See `Cache`; what a prompt left is never overwritten."""
        return self.decoder.holds(slot, max(0, num_tokens - (self.num_prompt[slot] - 1)))

    def keep(self, starts: Tensor, path: Tensor) -> None:
        """See `TreeCache`; no prompt has a node of a tree."""
        self.decoder.keep((starts - (self.prompt_lengths[: len(starts)] - 1)).clamp(min=0), path)

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        """Let a slot hold the first num_tokens of another's sequence, all of its prompt among them, or of its own."""
        num_prompt = self.num_prompt[source]
        for block in (block for layer in self.prompts for block in layer):
            block[slot, :, :num_prompt] = block[source, :, :num_prompt]
        self.decoder.copy_slot(source, slot, num_tokens - (num_prompt - 1))
        self.num_prompt[slot], self.num_cached[slot] = num_prompt, num_tokens
        self.prompt_lengths[slot] = num_prompt


class Seq2SeqLM(LanguageModel):
    """A transformers encoder-decoder of the T5 family with its tokenizer: T5, T5 1.1, Flan-T5, mT5, UMT5.

    Penalties count prompt tokens as for any model.

    Args:
        model: in eval mode.
        tokenizer: a transformers tokenizer, or None for token ids only.

    Attributes:
        context_length: no limit, since positions are relative; quality may still degrade for long prompts.

    Raises:
        UnsupportedModelError: if the model would be decoded incorrectly, which is verified by running it.
    """

    is_encoder_decoder = True
    is_spread = False

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.vocab_size: int = model.config.vocab_size
        self.device, self.dtype = model.device, model.dtype
        self.context_length = 1 << 30
        self._layers = _decoder_layers(model)
        self.num_layers = len(self._layers)
        self._start = start_token(model)
        self._biases = [_biases_by_distance(layer.own) for layer in self._layers]
        _check_ragged_equals_plain(self)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return eos_token_ids(self.model, self.tokenizer)

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: the decoder's and the head's."""
        modules = [*self.model.decoder.modules(), self.model.lm_head]
        return weight_bytes(module for module in modules if not isinstance(module, nn.Embedding))

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token of context, in the prompt or the output."""
        return int(2 * self.num_layers * self.config.num_heads * self.config.d_kv * self.dtype.itemsize)

    def allocate(self, num_slots: int, capacity: int, *, features: FeatureLayers = ()) -> Seq2SeqCache:
        if features:
            raise ValueError(
                f"features={features} must be () for an encoder-decoder, which keeps no hidden states; use a method "
                "without a head, such as ngram"
            )
        # zeros: a masked NaN would still poison the sum over values
        shape = (num_slots, self.config.num_heads, capacity, self.config.d_kv)
        blocks = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2 * self.num_layers)]
        lengths = torch.ones(num_slots, dtype=torch.int64, device=self.device)
        prompts = list(zip(blocks[::2], blocks[1::2], strict=True))
        return Seq2SeqCache(RaggedCache(self.num_layers, num_slots, capacity), prompts, lengths, capacity)

    @torch.inference_mode()
    def read(self, prompt: Sequence[int], cache: Seq2SeqCache, slot: int) -> None:
        """Encode a prompt into a slot, which then holds all but its last token.

        Raises ValueError if the prompt exceeds the cache's capacity.
        """
        if len(prompt) > cache.capacity:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens exceeds the cache's capacity of {cache.capacity}; allocate a "
                "larger one"
            )
        encoded = self.model.encoder(input_ids=upload([prompt], self.device)).last_hidden_state
        for layer, (keys, values) in zip(self._layers, cache.prompts, strict=True):
            keys[slot, :, : len(prompt)] = self._heads(layer.cross.k(encoded))[0]
            values[slot, :, : len(prompt)] = self._heads(layer.cross.v(encoded))[0]
        cache.num_prompt[slot], cache.num_cached[slot] = len(prompt), len(prompt) - 1
        cache.prompt_lengths[slot] = len(prompt)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: Seq2SeqCache,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        rows, width = tokens.shape
        slots = slice(first_slot, first_slot + rows)
        lengths = zip(cache.num_cached[slots], cache.num_prompt[slots], strict=True)
        cache.decoder.num_cached[slots] = [max(0, length - (num_prompt - 1)) for length, num_prompt in lengths]
        cache.decoder.open(first_slot, rows, width, self.device, branches)
        hidden = self._decode(tokens, cache, max(cache.num_prompt[slots]))
        return self._head(hidden[:, -1:] if last_only else hidden)

    @torch.inference_mode()
    def forward_at(
        self,
        tokens: Tensor,
        starts: Tensor,
        cache: Seq2SeqCache,
        extent: int,
        first_slot: int = 0,
        last: Tensor | None = None,
        branches: Branches | None = None,
    ) -> Tensor:
        num_prompt = cache.prompt_lengths[first_slot : first_slot + len(tokens)]
        starts = (starts - (num_prompt - 1)).clamp(min=0)
        cache.decoder.open_at(first_slot, starts, tokens.shape[1], extent, branches)
        hidden = self._decode(tokens, cache, extent)
        return self._head(hidden if last is None else hidden[:, last])

    def check_tree(self) -> None:
        """Raise UnsupportedModelError if tokens do not stand at the positions and see the tokens that a tree says."""
        check_tree_equals_plain(self)

    def _decode(self, tokens: Tensor, cache: Seq2SeqCache, longest_prompt: int) -> Tensor:
        """What the decoder makes of tokens at its cache's open window, [rows, width, hidden].

        longest_prompt: a bound on the prompts that are seen.
        """
        window, own = cache.decoder.window, cache.decoder.mask(self.dtype)
        hidden = self.model.decoder.embed_tokens(torch.where(window.positions == 0, self._start, tokens))
        of_prompt = _hiding(cache.prompt_lengths[window.slots], longest_prompt, self.dtype)
        distances = window.positions.unsqueeze(-1) - cache.decoder.seen_positions()
        bias = own
        for index, (layer, biases) in enumerate(zip(self._layers, self._biases, strict=True)):
            if biases is not None:  # in most models the first layer's serve all
                bias = biases[distances.clamp(0, len(biases) - 1)].permute(0, 3, 1, 2) + own
            hidden = self._own_attention(layer, index, hidden, bias, cache.decoder)
            hidden = self._cross_attention(layer, hidden, of_prompt, cache.prompts[index], window.slots)
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

    def _cross_attention(
        self, layer: _Layer, hidden: Tensor, mask: Tensor, prompts: tuple[Tensor, Tensor], slots: slice
    ) -> Tensor:
        queries = self._heads(layer.cross.q(layer.cross_norm(hidden)))
        keys, values = (block[slots, :, : mask.shape[-1]] for block in prompts)
        attended: Tensor = layer.cross.o(_attended(queries, keys, values, mask))
        return _clamped(hidden + attended)

    def _heads(self, states: Tensor) -> Tensor:
        """[rows, width, heads * head_dim] -> [rows, heads, width, head_dim]."""
        return states.view(*states.shape[:-1], self.config.num_heads, self.config.d_kv).transpose(1, 2)

    def _head(self, hidden: Tensor) -> Tensor:
        is_umt5 = self.config.model_type == "umt5"  # it has no name for it
        if getattr(self.config, "scale_decoder_outputs", is_umt5 and self.config.tie_word_embeddings):
            hidden = hidden * self.config.d_model**-0.5
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


def _decoder_layers(model: PreTrainedModel) -> list[_Layer]:
    try:
        parts = [block.layer for block in model.decoder.block]
        return [
            _Layer(own.SelfAttention, own.layer_norm, cross.EncDecAttention, cross.layer_norm, feed_forward)
            for own, cross, feed_forward in parts
        ]
    except (AttributeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers like T5's; give a model of the T5 family, or a decoder-only "
            "model"
        ) from error


def start_token(model: PreTrainedModel) -> int:
    """The token that a decoder starts from. Raises UnsupportedModelError if neither of the model's configs has it."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise UnsupportedModelError(
        f"decoder_start_token_id=None of {type(model).__name__} must be a token id; set it in the model's config.json"
    )


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


def _hiding(lengths: Tensor, extent: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, 1, 1, extent] that hides positions after each row's length, int64 [rows]."""
    hidden = torch.arange(extent, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


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


@torch.inference_mode()
def _check_ragged_equals_plain(lm: Seq2SeqLM) -> None:
    """Compare logits through the ragged cache, with a rollback and rows of unequal length, with a plain forward."""
    tokens = torch.arange(12, device=lm.device).mul(7919).remainder(lm.vocab_size).unsqueeze(0)
    prompt, cut = tokens[0, :5].tolist(), 4
    start = torch.full((1, 1), lm._start, device=lm.device)
    cache = lm.allocate(2, 24)
    try:
        fed = torch.cat([start, tokens[:, 5:]], 1)
        expected = lm.model(input_ids=tokens[:, :5], decoder_input_ids=fed, use_cache=False).logits
        for slot, source in enumerate((prompt[:3] + prompt, prompt)):
            lm.read(source, cache, slot)
            lm.forward(tokens[:, : cut + 3].flip(1), cache, first_slot=slot)
            cache.num_cached[slot] = len(source) - 1
        lm.forward(tokens[:, 4 : 4 + cut], cache, first_slot=1)
        cache.num_cached[:] = [7 + cut + 3, 4 + cut]  # the row that is looked at is the shorter one
        actual = lm.forward(tokens[:, 4 + cut :].expand(2, -1), cache)[1]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(lm.model).__name__} does not take what a model of the T5 family takes: {error}"
        ) from error
    check_logits(actual, expected[0, cut:], type(lm.model).__name__, lm.num_layers)
