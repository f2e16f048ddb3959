"""Decoders of transformers models that are run unchanged: BART, Pegasus, Marian, M2M-100, T5Gemma and related ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from specdec.models.decoders.base import KeysValues
from specdec.models.positions.embeddings import PositionEmbeddings
from specdec.models.state.ragged import RaggedCache


class AttentionDecoder:
    """The decoder of an encoder-decoder whose layers attend to a cache of their own and to one of the prompt.

    start: the token that it starts from. Whatever transformers raises for a model that is not like this is raised.
    """

    def __init__(self, model: Any, start: int) -> None:
        self.model, self._start = model, start
        decoder = model.get_decoder()
        takes_ids = "decoder_position_ids" in inspect.signature(model.forward).parameters
        self._embeddings = None if takes_ids else PositionEmbeddings(decoder)
        self.context_length = _context_length(model)
        self.num_layers = len(self.encode(torch.tensor([[start]], device=model.device)))

    @torch.inference_mode()
    def encode(self, prompt: Tensor) -> list[KeysValues]:
        caches = EncoderDecoderCache(DynamicCache(), DynamicCache())
        first = torch.full((1, 1), self._start, device=prompt.device)
        self.model(input_ids=prompt, decoder_input_ids=first, past_key_values=caches, use_cache=True)
        return [(layer.keys[0], layer.values[0]) for layer in caches.cross_attention_cache.layers]

    def logits(
        self, tokens: Tensor, cache: RaggedCache, prompts: Sequence[KeysValues], mask: Tensor, keep: int | Tensor
    ) -> Tensor:
        # padding may lie beyond the model's last position
        positions = cache.window.positions.clamp(max=self.context_length - 1)
        # of the encoder's states only the shape is read, as the cache has their keys and values
        encoded = MoeModelOutputWithPast(last_hidden_state=mask.new_zeros(len(tokens), mask.shape[-1], 1))
        with self._positions(tokens, positions) as inputs:
            logits = self.model(
                encoder_outputs=encoded,
                attention_mask=mask.expand(-1, -1, tokens.shape[1], -1),
                decoder_input_ids=tokens,
                decoder_attention_mask=cache.mask(mask.dtype),
                past_key_values=EncoderDecoderCache(cache, _Prompts(prompts)),
                use_cache=True,
                **inputs,
            ).logits
        return logits[:, slice(-keep, None) if isinstance(keep, int) else keep]  # type: ignore[no-any-return]

    @contextmanager
    def _positions(self, tokens: Tensor, positions: Tensor) -> Iterator[dict[str, Tensor]]:
        if self._embeddings is None:
            yield {"decoder_position_ids": positions}
        else:
            with self._embeddings.applied(tokens, positions):
                yield {}


def _context_length(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "max_decoder_position_embeddings"))
    return next((length for length in named if isinstance(length, int)), 1 << 30)


class _Prompts(Cache):  # type: ignore[misc]  # transformers has no complete types
    """The keys and values of encoded prompts, which are complete."""

    def __init__(self, prompts: Sequence[KeysValues]) -> None:
        super().__init__(layers=[_of_prompt(*states) for states in prompts])


def _of_prompt(keys: Tensor, values: Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
