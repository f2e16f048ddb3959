"""The seam to a language model: what the decode loop and a draft model need of it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    """What a model remembers of the tokens it was given: a fixed number of slots, each holding one sequence.

    lengths: valid tokens per slot. Rolling back is setting a length; nothing else needs to be undone.
    capacity: tokens that a slot can hold.
    features: float [slots, capacity, hidden], what the model's output head read after each token, in the same places
    as the tokens; None unless they were asked for.
    """

    lengths: list[int]
    capacity: int
    features: Tensor | None


class LanguageModel(Protocol):
    """A causal language model over a ragged cache."""

    vocab_size: int
    context_length: int
    device: torch.device

    def allocate(self, num_slots: int, capacity: int, *, keep_features: bool = False) -> Cache:
        """An empty cache of num_slots sequences of up to `capacity` tokens each.

        Raises ValueError if features are to be kept and the model has none.
        """
        ...

    def forward(self, tokens: Tensor, cache: Any, first_slot: int = 0, last_only: bool = False) -> Tensor:
        """Logits after each of the given tokens, which follow the cache's valid tokens.

        tokens: int64 [rows, width]; row r belongs to slot first_slot + r and stands at positions
        lengths[slot], lengths[slot] + 1, ... A row may end in padding: its logits mean nothing.
        Returns float [rows, width, vocab], or [rows, 1, vocab] for the last token if last_only.
        The tokens are written behind the valid ones; `cache.lengths` is left to the caller.
        """
        ...


PREFILL_CHUNK = 512  # tokens; bounds the attention scores and the mask that a long prompt needs at once


def prefill(model: LanguageModel, tokens: Sequence[int], cache: Cache, slot: int) -> Tensor:
    """Append tokens to one slot, in chunks, and advance its length; returns the last token's logits [1, 1, vocab].

    Raises ValueError if there are no tokens.
    """
    if not tokens:
        raise ValueError("tokens=[] must not be empty: a model needs at least one token to continue from")
    for start in range(0, len(tokens), PREFILL_CHUNK):
        chunk = torch.tensor([tokens[start : start + PREFILL_CHUNK]], device=model.device)
        logits = model.forward(chunk, cache, first_slot=slot, last_only=True)
        cache.lengths[slot] += chunk.shape[1]
    return logits
