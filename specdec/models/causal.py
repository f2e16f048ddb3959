"""Transformers decoder-only models as `LanguageModel`s, with the ragged static cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, get_layer_types_and_kwargs

from specdec.models import trial
from specdec.models.base import FINAL, MAX_ROLLBACK, FeatureLayers, LanguageModel
from specdec.models.early_exit import first_layers
from specdec.models.features import HiddenStates
from specdec.models.fusion import FusedDecoder, depends_on_length, weight_bytes
from specdec.models.positions.gpt_neo import local_layers
from specdec.models.positions.rows import RowPositions
from specdec.models.refusals import UnsupportedModelError as UnsupportedModelError
from specdec.models.state.length_factors import LengthCache, length_factors
from specdec.models.state.mixers import StatesElsewhereError, cache_argument, recurrent_layers, step_mixers
from specdec.models.state.ragged import RaggedCache
from specdec.models.state.recurrent import RecurrentCache, plain_cache, recurrent_cache
from specdec.models.state.windows import LocalAttention
from specdec.trees.columns import Branches


class CausalLM(LanguageModel):
    """A transformers causal language model with its tokenizer.

    Args:
        model: in eval mode, with eager or SDPA attention.
        tokenizer: a transformers tokenizer, or None for token ids only.

    Attributes:
        context_length: maximum length of prompt and output together.
        context_name: the field of the model's config that limits it.
        local: by layer, its sliding window or chunks, or None.
        is_spread: whether the weights are on several devices; tokens then go to the first, which returns the logits.

    Raises:
        UnsupportedModelError: if the model would be decoded incorrectly, which is verified by running it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self._describe(model, tokenizer)
        trial.check_ragged_equals_plain(self)

    def _describe(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = model.config.get_text_config(decoder=True)
        self.vocab_size: int = self.config.vocab_size
        self.mask_token = getattr(self.config, "pard_token", None)
        self.device, self.dtype = model.device, model.dtype
        self.is_spread = len({weight.device for weight in model.parameters()}) > 1
        plain = _plain_cache(model)
        self.num_layers = len(plain.layers) or self.config.num_hidden_layers
        self.context_length, self.context_name = _context_limit(self.config)
        self._positions = RowPositions(model)
        self.context_length -= self._positions.first
        self.local = _local_attention(model)
        self.max_draft_tokens = _max_draft_tokens(self.local, self.context_length)
        self._recurrent = frozenset(recurrent_layers(plain))
        self.is_recurrent = _is_recurrent(model, self._recurrent)
        self._has_attention = not self.is_recurrent or any(isinstance(layer, DynamicLayer) for layer in plain.layers)
        self._cache_argument = cache_argument(model) or "past_key_values"
        self._factors = length_factors(model, self.context_length)
        self._fused = model.base_model if isinstance(model.base_model, FusedDecoder) else None
        self._owns_features = True

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return eos_token_ids(self.model, self.tokenizer)

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def is_recordable(self) -> bool:
        """Whether calls can be captured as CUDA graphs: on one device, without decisions by the host."""
        return not (self.is_spread or self.is_recurrent or any(map(depends_on_length, self.model.modules())))

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: all except the embedding table, of which it reads a few rows."""
        return weight_bytes(module for module in self.model.modules() if not isinstance(module, nn.Embedding))

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values per token of context."""
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * self.num_layers * heads * head_dim * self.dtype.itemsize)

    def first_layers(self, number: int) -> CausalLM:
        """The model cut after its first `number` layers, with the same norm, head and weights, for the same caches.

        Raises ValueError unless 1 <= number < num_layers, and UnsupportedModelError if the model cannot be cut.
        """
        name = type(self.model).__name__
        if not 1 <= number < self.num_layers:
            raise ValueError(
                f"exit_layer={number} must be at least 1 and below the layers of {name}, {self.num_layers}"
            )
        if self.is_spread or any(hasattr(module, "_hf_hook") for module in self.model.modules()):
            raise UnsupportedModelError(f"{name} is spread over devices; put it on one to draft with its first layers")
        if self._factors:
            raise UnsupportedModelError(
                f"{name} has length-dependent rotary factors (longrope), so its first layers cannot share its cache; "
                'use another method, such as "ngram"'
            )
        shorter = first_layers(self.model, self.num_layers, number)
        if shorter is None:
            raise UnsupportedModelError(
                f"{name} must have its {self.num_layers} layers in one list to be cut; use another method"
            )
        cut = CausalLM(shorter, self.tokenizer)
        cut._owns_features = False  # those of the shared cache belong to the full model
        return cut

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> RaggedCache:
        """An empty cache of num_slots sequences of up to `capacity` tokens each.

        max_rollback: see `LanguageModel`; recurrent layers keep max_rollback + 1 states per slot.
        features: hidden states to keep, on the device of the tokens and in the model's dtype. They take as many bytes
        as their widths together, times num_slots * capacity * dtype.itemsize: for A layers, A * hidden_size numbers per
        token. Raises ValueError for those that the model does not have, and UnsupportedModelError if its layers cannot
        be read.
        """
        cache: RaggedCache
        if self._factors:
            cache = LengthCache(self.num_layers, num_slots, capacity, self.device, self.local)
        elif self.is_recurrent:
            cache = recurrent_cache(self.model.config, num_slots, capacity, max_rollback + 1, self.local)
        else:
            cache = RaggedCache(self.num_layers, num_slots, capacity, self.local)
        if features:
            cache.add_features(features, self._widths(features), self.dtype, self.device)
        return cache

    def _widths(self, features: FeatureLayers) -> list[int]:
        """The width of each of these hidden states; raises as `allocate`."""
        name, num_layers = type(self.model).__name__, self.config.num_hidden_layers
        outside = [layer for layer in features if not FINAL <= layer <= num_layers]
        if outside:
            raise ValueError(
                f"features={features} must be from 0, the embeddings, to {num_layers}, the number of layers of {name}, "
                f"or {FINAL} for the state after the final norm; correct {', '.join(map(str, outside))} in the config "
                "of the head, or use a head of this model"
            )
        widths = (self._fused or self._hidden_states).widths
        if not widths.keys() >= set(features):
            raise UnsupportedModelError(
                f"features={features} needs a model with a list of layers, each of which reads the output of the one "
                f"before, but {name} has none; use a head that reads {sorted(widths)} only, or another method"
            )
        return [widths[layer] for layer in features]

    @cached_property
    def _hidden_states(self) -> HiddenStates:
        return HiddenStates(self.model, self.config.num_hidden_layers)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        cache: RaggedCache,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        if tokens.shape[1] <= cache.max_width or branches is not None:
            return self._call(tokens, cache, first_slot, last_only, branches)
        slots, pieces = slice(first_slot, first_slot + len(tokens)), tokens.split(cache.max_width, 1)
        lengths, logits = cache.num_cached[slots], []
        for piece in pieces:
            logits.append(self._call(piece, cache, first_slot, last_only))
            cache.num_cached[slots] = [length + piece.shape[1] for length in cache.num_cached[slots]]
        cache.num_cached[slots] = lengths
        return logits[-1] if last_only else torch.cat(logits, 1)

    def _call(
        self, tokens: Tensor, cache: RaggedCache, first_slot: int, last_only: bool, branches: Branches | None = None
    ) -> Tensor:
        """`forward` for no more tokens than fit in one call, see `RaggedCache.max_width`."""
        if self._factors:
            assert isinstance(cache, LengthCache), "allocated by this model"
            return self._factors.forward(self._forward, tokens, cache, first_slot, last_only, branches)
        return self._forward(tokens, cache, first_slot, last_only, branches)

    def _forward(
        self, tokens: Tensor, cache: RaggedCache, first_slot: int, last_only: bool, branches: Branches | None
    ) -> Tensor:
        rows, width = tokens.shape
        cache.open(first_slot, rows, width, self.device, branches)
        if isinstance(cache, RecurrentCache):
            cache.is_prompt = last_only
        return self._logits(tokens, cache, 1 if last_only else 0)

    @torch.inference_mode()
    def forward_at(
        self,
        tokens: Tensor,
        starts: Tensor,
        cache: RaggedCache,
        extent: int,
        first_slot: int = 0,
        last: Tensor | None = None,
        branches: Branches | None = None,
    ) -> Tensor:
        if self._factors:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has length-dependent rotary factors (longrope), so its steps cannot be "
                "recorded; use records=False"
            )
        cache.open_at(first_slot, starts, tokens.shape[1], extent, branches)
        return self._logits(tokens, cache, 0 if last is None else last)

    def _logits(self, tokens: Tensor, cache: RaggedCache, keep: int | Tensor) -> Tensor:
        """Logits of the cache's open window: of the last `keep` tokens (0 for all), or at the indices `keep`.

        Also writes the features of the window.
        """
        layers = cache.feature_layers if self._owns_features else ()
        if self._fused:
            states = self._fused.hidden_states(tokens, cache, layers)
            if layers:
                cache.write_features(torch.cat([states[layer] for layer in layers], -1))
            kept = slice(-keep, None) if isinstance(keep, int) else keep
            return self._fused.logits(self.model.lm_head(states[FINAL][:, kept])).to(self.device)
        # padding may lie beyond the model's last position
        positions = cache.window.positions.clamp(max=self.context_length - 1)
        with (
            self._hidden_states.reading(layers, cache.write_features) if layers else nullcontext(),
            self._positions.applied(tokens, positions, cache, self._masks(cache)) as inputs,
        ):
            inputs = inputs if self._has_attention else {}
            state = {self._cache_argument: cache}
            logits = self.model(input_ids=tokens, **state, use_cache=True, logits_to_keep=keep, **inputs).logits
        return _kept(logits.to(self.device), keep, tokens.shape[1])

    def _masks(self, cache: RaggedCache) -> Tensor | dict[str, Tensor | None]:
        """Attention masks of the open window: one for all layers, or one by kind of layer, as transformers expects."""
        if not any(cache.local):
            return cache.mask(self.dtype)
        kinds = getattr(self.config, "layer_types", None)
        if kinds is None:
            return cache.mask(self.dtype, cache.local[0])
        return {
            kind: None if index in self._recurrent else cache.mask(self.dtype, local)
            for index, (kind, local) in enumerate(zip(kinds, cache.local, strict=False))
        }

    def check_tree(self) -> None:
        """Raise UnsupportedModelError if the model ignores the positions or the attention mask of a tree."""
        trial.check_tree_equals_plain(self)


def _kept(logits: Tensor, keep: int | Tensor, width: int) -> Tensor:
    """The requested columns of the logits, which some models return for all `width` tokens whatever is requested."""
    expected = len(keep) if isinstance(keep, Tensor) else keep or width
    if logits.shape[1] == expected:
        return logits
    return logits[:, slice(-keep, None) if isinstance(keep, int) else keep]


def eos_token_ids(model: PreTrainedModel, tokenizer: Any = None) -> frozenset[int]:
    """A model's end-of-sequence tokens, from its generation config, else its config, else its tokenizer."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos is None:
        eos = getattr(tokenizer, "eos_token_id", None)
    return frozenset([eos] if isinstance(eos, int) else eos or [])


_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}  # transformers 5.17 has no DummyLayer
_CONTEXT_NAMES = ("max_position_embeddings", "max_seq_len", "n_positions", "n_ctx", "max_sequence_length")


def _plain_cache(model: PreTrainedModel) -> Cache:
    """transformers' own cache for the model, whose layers show what has to be rolled back.

    Raises UnsupportedModelError for layers that cannot be, and for attention without per-row masks.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; use Seq2SeqLM, or a decoder-only model")
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in ("eager", "sdpa"):
        raise UnsupportedModelError(
            f"attention={attention!r} of {name} must be 'eager' or 'sdpa': others do not support per-row masks"
        )
    plain = plain_cache(model.config)
    for index, layer in enumerate(plain.layers):
        if type(layer).__name__ not in _LAYERS and not isinstance(layer, LinearAttentionLayer):
            raise UnsupportedModelError(
                f"layer {index} of {name} keeps a {type(layer).__name__}, which cannot be "
                "rolled back after a rejection; use a model with full attention in every layer"
            )
    return plain


def _context_limit(config: Any) -> tuple[int, str]:
    """(context length, name of the field that limits it) of a text model's config."""
    named = (name for name in _CONTEXT_NAMES if isinstance(getattr(config, name, None), int))
    context_name = next(named, "max_position_embeddings")
    stated = getattr(config, context_name, None) or 0
    return stated if stated > 0 else 1 << 30, context_name  # XLNet says -1


def _local_attention(model: PreTrainedModel) -> tuple[LocalAttention | None, ...]:
    """The sliding window or chunks of each cache layer, or None for full attention.

    Raises UnsupportedModelError for layers of one kind with different windows: transformers gives them the same mask.
    """
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "gpt_neo":
        return local_layers(config)
    windows = _windows(config)
    kinds = getattr(config, "layer_types", None) or ["all layers"] * len(windows)
    local: dict[str, LocalAttention | None] = {}
    for kind, (cache, window) in zip(kinds, windows, strict=False):  # 5.17 has no entry for layers without a cache
        own = LocalAttention(window, cache == "chunked_attention") if window else None
        if cache != "dummy" and local.setdefault(kind, own) != own:
            raise UnsupportedModelError(
                f"{type(model).__name__} has different windows in {kind}, {local[kind]} and {own}; use a model with "
                "one window for each of its layer_types"
            )
    # a layer without keys and values of its own reads those of its kind
    return tuple(local.get(kind) for kind in kinds)


def _windows(config: Any) -> list[tuple[str, int | None]]:
    """The kind of each layer's cache, and its sliding window or size of chunks, None for neither."""
    caches, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers 5.17: those of all layers together
        options = [options if "sliding" in cache or "chunked" in cache else {} for cache in caches]
    return [(cache, option.get("sliding_window")) for cache, option in zip(caches, options, strict=True)]


def _max_draft_tokens(local: Sequence[LocalAttention | None], context_length: int) -> int | None:
    """See `LanguageModel`: two steps, as the next may be launched before one is read, fit beside each window."""
    overwritten = [each for each in local if each and each.num_columns(context_length) < context_length]
    return min((each.num_spare // 2 - 1 for each in overwritten), default=None)


def _is_recurrent(model: PreTrainedModel, layers: Collection[int]) -> bool:
    """Whether a model has recurrent layers, which are then stepped. Raises UnsupportedModelError if they cannot be.

    layers: those that transformers' cache has.
    """
    if not (layers or getattr(model, "_is_stateful", False)):
        return False
    try:
        step_mixers(model)
    except StatesElsewhereError as error:
        raise UnsupportedModelError(f"{error}; use another model") from error
    except Exception as error:  # any exception of a model's forward means that it is unsupported
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps recurrent states and does not support transformers' cache for them (its "
            f"forward raised {type(error).__name__}), so they cannot be rolled back; use another model"
        ) from error
    return True
