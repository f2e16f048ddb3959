"""Encoder-decoder models as `LanguageModel`s: the encoder reads the prompt.

A row's tokens are its prompt and its output, as for any model, and the last prompt token stands for the decoder's start
token. For a prompt of n tokens, token i is thus at decoder position i - (n - 1), and the loop, proposers and
verification work unchanged. Besides the decoder's keys and values, a slot holds those of the encoded prompt, which are
computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.models.base import MAX_ROLLBACK, FeatureLayers, LanguageModel
from specdec.models.causal import eos_token_ids
from specdec.models.decoders.attention import AttentionDecoder
from specdec.models.decoders.base import Decoder, KeysValues
from specdec.models.decoders.t5 import t5_decoder
from specdec.models.fusion import weight_bytes
from specdec.models.refusals import UnsupportedModelError, cannot_decode_seq2seq
from specdec.models.state.ragged import RaggedCache
from specdec.models.trial import check_logits, check_tree_equals_plain, in_two_calls, rounding
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
    """A transformers encoder-decoder with its tokenizer: of the families of T5, BART, Pegasus, Marian and M2M-100.

    Penalties count prompt tokens as for any model.

    Args:
        model: in eval mode.
        tokenizer: a transformers tokenizer, or None for token ids only.

    Attributes:
        context_length: maximum length of prompt and output together: that of the positions that the model has, without
            a limit where they are relative.

    Raises:
        UnsupportedModelError: if the model would be decoded incorrectly, which is verified by running it.
    """

    is_encoder_decoder = True
    is_spread = False

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.vocab_size: int = model.config.vocab_size
        self.device, self.dtype = model.device, model.dtype
        self._start = start_token(model)
        self._decoder = _decoder(model, self._start)
        self.num_layers, self.context_length = self._decoder.num_layers, self._decoder.context_length
        first = torch.tensor([[self._start]], device=self.device)
        self._shapes = [
            tuple((block.shape[0], block.shape[2]) for block in pair) for pair in self._decoder.encode(first)
        ]
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
        modules = [*self.model.get_decoder().modules(), self.model.get_output_embeddings()]
        return weight_bytes(module for module in modules if not isinstance(module, nn.Embedding))

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token of context, in the prompt or the output."""
        return int(sum(heads * dim for pair in self._shapes for heads, dim in pair) * self.dtype.itemsize)

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> Seq2SeqCache:
        if features:
            raise ValueError(
                f"features={features} must be () for an encoder-decoder, which keeps no hidden states; use a method "
                "without a head, such as ngram"
            )
        # zeros: a masked NaN would still poison the sum over values

        def block(heads: int, dim: int) -> Tensor:
            return torch.zeros(num_slots, heads, capacity, dim, dtype=self.dtype, device=self.device)

        lengths = torch.ones(num_slots, dtype=torch.int64, device=self.device)
        prompts = [(block(*keys), block(*values)) for keys, values in self._shapes]
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
        for states, blocks in zip(self._decoder.encode(upload([prompt], self.device)), cache.prompts, strict=True):
            for state, block in zip(states, blocks, strict=True):
                block[slot, :, : len(prompt)] = state
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
        return self._logits(tokens, cache, max(cache.num_prompt[slots]), 1 if last_only else 0)

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
        return self._logits(tokens, cache, extent, 0 if last is None else last)

    def check_tree(self) -> None:
        """Raise UnsupportedModelError if tokens do not stand at the positions and see the tokens that a tree says."""
        check_tree_equals_plain(self)

    def _logits(self, tokens: Tensor, cache: Seq2SeqCache, longest_prompt: int, keep: int | Tensor) -> Tensor:
        """Logits of tokens at the decoder's open window; see `Decoder.logits`.

        longest_prompt: a bound on the prompts that are seen.
        """
        window = cache.decoder.window
        started = torch.where(window.positions == 0, self._start, tokens)
        mask = _hiding(cache.prompt_lengths[window.slots], longest_prompt, self.dtype)
        prompts = self._prompts(cache, window.slots, longest_prompt)
        return self._decoder.logits(started, cache.decoder, prompts, mask, keep)

    def _prompts(self, cache: Seq2SeqCache, slots: slice, longest: int) -> list[KeysValues]:
        """The keys and values of the prompts of these slots, [rows, heads, longest, head_dim] each."""
        return [(keys[slots, :, :longest], values[slots, :, :longest]) for keys, values in cache.prompts]


def _decoder(model: PreTrainedModel, start: int) -> Decoder:
    """The decoder of a model. Raises UnsupportedModelError if it cannot run over ragged caches."""
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} encodes {model.main_input_name}, but a prompt has token ids; its encoder would "
            "have to be given them, which no request holds; use an encoder-decoder that reads text"
        )
    try:
        return t5_decoder(model) or AttentionDecoder(model, start)
    except Exception as error:  # whatever the model raises means that it is unsupported
        raise UnsupportedModelError(cannot_decode_seq2seq(model, error)) from error


def start_token(model: PreTrainedModel) -> int:
    """The token that a decoder starts from. Raises UnsupportedModelError if neither of the model's configs has it."""
    for config in (model.generation_config, model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise UnsupportedModelError(
        f"decoder_start_token_id=None of {type(model).__name__} must be a token id; set it in the model's config.json"
    )


def _hiding(lengths: Tensor, extent: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [rows, 1, 1, extent] that hides positions after each row's length, int64 [rows]."""
    hidden = torch.arange(extent, device=lengths.device) >= lengths.unsqueeze(1)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


@torch.inference_mode()
def _check_ragged_equals_plain(lm: Seq2SeqLM) -> None:
    """Compare logits through the ragged cache, with a rollback and rows of unequal length, with a plain forward."""
    tokens = torch.arange(12, device=lm.device).mul(7919).remainder(lm.vocab_size).unsqueeze(0)
    padding = lm.config.pad_token_id  # some models give it no position
    tokens = tokens if padding is None else torch.where(tokens == padding, (padding + 1) % lm.vocab_size, tokens)
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
        actual = in_two_calls(lm, tokens[:, 4 + cut :].expand(2, -1), cache)[1]
    except Exception as error:  # any exception of a model's forward means that it is unsupported
        raise UnsupportedModelError(cannot_decode_seq2seq(lm.model, error)) from error
    check_logits(actual, expected[0, cut:], type(lm.model).__name__, rounding(lm.dtype, lm.num_layers))
