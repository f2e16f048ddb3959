"""Protocols of a language model and its cache, as used by the decoding loop and by draft models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from specdec.runtime.devices import upload
from specdec.runtime.recording import Recorder
from specdec.trees.columns import Branches

FeatureLayers = tuple[int, ...]
"""Hidden states of a target that a head reads, concatenated in this order in `Cache.features`.

Each is an index into transformers' `hidden_states`: 0 for the embeddings, i for the output of layer i - 1, which enters
layer i, up to the number of layers for the last layer's output before the final norm; FINAL is that after the norm.
"""
FINAL = -1
MAX_ROLLBACK = 16  # tokens by which a sequence can be cut unless the caller allocates for another number


class Cache(Protocol):
    """A model's state for a fixed number of slots, each holding one sequence.

    num_cached: valid tokens per slot. Rollback only lowers it, to a number that the slot still `holds`.
    capacity: maximum tokens per slot.
    features: float [slots, capacity, width], hidden states of the tokens in the same places, those of all requested
    layers concatenated; None if none were requested.
    """

    num_cached: list[int]
    features: Tensor | None

    @property
    def capacity(self) -> int: ...

    def holds(self, slot: int, num_tokens: int) -> bool:
        """Whether a slot can be rolled back to its first num_tokens tokens; always to 0, and by one step's tokens."""
        ...

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        """Copy the first num_tokens >= 1 tokens of a slot to another, or truncate a slot; it must hold them."""
        ...


class TreeCache(Cache, Protocol):
    """A cache that can keep the accepted nodes of a token tree."""

    def keep(self, starts: Tensor, path: Tensor) -> None:
        """Move row r's entry in column starts[r] + path[r, i] to column starts[r] + i, for i = 0, 1, ...

        starts: int64 [rows], for the first slots. path: int64 [rows, n], ascending with path[r, i] >= i; the accepted
        nodes of a tree, which are then consecutive.
        """
        ...


class LanguageModel(Protocol):
    """A causal language model over a ragged cache. Subclasses inherit the defaults below.

    context_length: maximum length of prompt and output together. context_name: what limits it.
    tokenizer: a transformers tokenizer, or None for token ids only.
    is_encoder_decoder: whether it is an EncoderDecoder.
    mask_token: the token that a parallel draft model (PARD) fills in; None for any other model.
    max_draft_tokens: the most tokens that a step can verify and reject, or draw as a draft; None for any number.
    """

    vocab_size: int
    context_length: int
    device: torch.device
    context_name: str = "model's context"
    tokenizer: Any = None
    is_encoder_decoder: bool = False
    mask_token: int | None = None
    max_draft_tokens: int | None = None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence."""
        return frozenset()

    @property
    def generation_config(self) -> Any:
        """The transformers GenerationConfig, or None."""
        return None

    @property
    def is_recordable(self) -> bool:
        """Whether calls can be captured as CUDA graphs: on one device, without decisions by the host."""
        return True

    def check_tree(self) -> None:
        """Raise ValueError if the model cannot score token trees."""
        return

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> Cache:
        """An empty cache of num_slots sequences of up to `capacity` tokens each.

        features: hidden states to keep; raises ValueError for those that the model does not have. max_rollback: the
        most tokens by which a sequence will be rolled back, other than to nothing; attention keeps them all anyway.
        """
        ...

    def forward(self, tokens: Tensor, cache: Any, first_slot: int = 0, last_only: bool = False) -> Tensor:
        """Logits after each token of a batch that continues the cached sequences.

        tokens: int64 [rows, width]; row r belongs to slot first_slot + r, at positions num_cached[slot],
        num_cached[slot] + 1, ... A row may end in padding, with meaningless logits.
        Returns float [rows, width, vocab], or [rows, 1, vocab] for the last token if last_only.
        The tokens are written to the cache; the caller advances `cache.num_cached`.
        """
        ...


class TreeModel(LanguageModel, Protocol):
    """A language model that can score token trees."""

    def forward(
        self,
        tokens: Tensor,
        cache: Any,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        """As `LanguageModel.forward`; with branches, the tokens form a tree, and each attends only to its ancestors.

        They are written to consecutive columns; `TreeCache.keep` then moves the accepted ones together.
        """
        ...


class FixedShapeModel(LanguageModel, Protocol):
    """A language model whose calls can be captured as CUDA graphs: they do not depend on values known to the host."""

    def forward_at(
        self,
        tokens: Tensor,
        starts: Tensor,
        cache: Any,
        extent: int,
        first_slot: int = 0,
        last: Tensor | None = None,
        branches: Branches | None = None,
    ) -> Tensor:
        """As `forward`, but row r starts at position starts[r], int64 [rows], and `cache.num_cached` is ignored.

        extent: an upper bound on the attended positions, from `cache.reserve`. last: int64 [1], the only column for
        which to compute logits, or None for all.
        """
        ...


@runtime_checkable
class LayeredModel(LanguageModel, Protocol):
    """A language model whose first layers can draft for all of them."""

    num_layers: int

    def first_layers(self, number: int) -> LanguageModel:
        """The model cut after its first `number` layers, for the same caches.

        Raises ValueError if it cannot be cut there.
        """
        ...


class EncoderDecoder(LanguageModel, Protocol):
    """A language model that encodes the whole prompt before decoding; `prefill` calls `read` for it."""

    def read(self, prompt: Sequence[int], cache: Any, slot: int) -> None:
        """Encode a prompt into a slot, all but its last token, which is then decoded like any other."""
        ...


PREFILL_CHUNK = 512  # tokens; bounds the memory for the attention scores and mask of a long prompt


def score(
    model: LanguageModel, tokens: Tensor, cache: Cache, recorder: Recorder, branches: Branches | None = None
) -> Tensor:
    """Logits [rows, width, vocab] after tokens [rows, width] that continue the sequences of the first slots."""
    if not recorder.records:
        if branches is None:
            return model.forward(tokens, cache)
        return cast("TreeModel", model).forward(tokens, cache, branches=branches)
    fixed_model, fixed_cache, starts = cast("Any", model), cast("Any", cache), cache.num_cached[: len(tokens)]
    extent = fixed_cache.reserve(0, starts, tokens.shape[1])
    further = () if branches is None else (0, None, branches)
    logits: Tensor = recorder(fixed_model.forward_at, tokens, upload(starts, model.device), cache, extent, *further)
    return logits


_PREFILL_WIDTHS = (16, 64, 256, PREFILL_CHUNK)  # captured as CUDA graphs; a chunk is padded to the next larger width


def prefill(
    model: LanguageModel,
    tokens: Sequence[int],
    cache: Cache,
    slot: int,
    recorder: Recorder | None = None,
    num_prompt: int | None = None,
) -> Tensor:
    """Append tokens to one slot, in chunks, and advance its length; returns the last token's logits [1, 1, vocab].

    recorder: replays calls of the same shape, if it records. num_prompt: for an empty slot, the number of leading
    tokens that are the prompt, for the encoder; None for all.
    Raises ValueError if there are no tokens.
    """
    if not tokens:
        raise ValueError("tokens=[] must not be empty: a model needs at least one token to continue from")
    if model.is_encoder_decoder and cache.num_cached[slot] == 0:
        cast("EncoderDecoder", model).read(tokens[:num_prompt], cache, slot)
        tokens = tokens[cache.num_cached[slot] :]
    records = recorder is not None and recorder.records
    size = min(PREFILL_CHUNK, cast("Any", cache).max_width) if records else PREFILL_CHUNK
    for start in range(0, len(tokens), size):
        chunk = tokens[start : start + size]
        if recorder and records:
            logits = _prefill_chunk(model, chunk, cache, slot, recorder, size)
        else:
            logits = model.forward(upload([chunk], model.device), cache, first_slot=slot, last_only=True)
        cache.num_cached[slot] += len(chunk)
    return logits


def hold(model: LanguageModel, prompt: Sequence[int], cache: Cache, slot: int) -> None:
    """Prefill an empty slot with all of a prompt but its last token, which is then decoded like any other."""
    if model.is_encoder_decoder:
        cast("EncoderDecoder", model).read(prompt, cache, slot)
    elif len(prompt) > 1:
        prefill(model, prompt[:-1], cache, slot)


def _prefill_chunk(model: Any, chunk: Sequence[int], cache: Any, slot: int, recorder: Recorder, size: int) -> Tensor:
    width = min(next(width for width in _PREFILL_WIDTHS if width >= len(chunk)), size)
    start = cache.num_cached[slot]
    extent = cache.reserve(slot, [start], width)
    padded = upload([[*chunk, *[0] * (width - len(chunk))]], model.device)
    starts, last = upload([start], model.device), upload([len(chunk) - 1], model.device)
    logits: Tensor = recorder(model.forward_at, padded, starts, cache, extent, slot, last)
    return logits
