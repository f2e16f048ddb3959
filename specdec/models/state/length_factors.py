"""LongRoPE: rotary factors that depend on the length of each sequence.

A LongRoPE model has two sets of rotary factors: one for sequences of up to `original_max_position_embeddings` tokens,
one for longer ones. transformers selects the set by the largest position of a call, for all of its rows, so the logits
after a token depend on the other rows of the batch, on the draft tokens after it and on how the prompt was chunked.

Here the logits after n tokens always use the factors for n tokens, as the model does without a cache.
`transformers.generate` does the same for Phi-3 and Phi-3.5-MoE, where it recomputes a sequence that crosses the
threshold; for other architectures it keeps the keys and values computed with the short factors.

Keys and values of all layers depend on the factors. So a sequence that crosses the threshold is recomputed once, and a
step whose draft crosses it is computed with both sets. For a prompt longer than the threshold, this recomputes at most
`original_max_position_embeddings` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.models.state.ragged import RaggedCache
from specdec.models.state.windows import LocalAttention
from specdec.trees.columns import Branches, offsets

Forward = Callable[..., Tensor]  # `CausalLM._forward`
_CHUNK = 512  # tokens recomputed per call


class LengthCache(RaggedCache):
    """A ragged cache that also stores the tokens, so that it can be recomputed.

    tokens: int64 [slots, capacity], at the same columns as their keys and values. is_long: per slot, whether its valid
    tokens were computed with the long factors.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        capacity: int,
        device: torch.device,
        local: Sequence[LocalAttention | None] = (),
    ) -> None:
        super().__init__(num_layers, num_slots, capacity, local)
        self.tokens = torch.zeros(num_slots, capacity, dtype=torch.int64, device=device)
        self.is_long = [False] * num_slots

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        super().copy_slot(source, slot, num_tokens)
        self.tokens[slot, :num_tokens] = self.tokens[source, :num_tokens]
        self.is_long[slot] = self.is_long[source]

    def keep(self, starts: Tensor, path: Tensor) -> None:
        super().keep(starts, path)
        row, starts = torch.arange(len(path), device=path.device).unsqueeze(1), starts.unsqueeze(1)
        to = (starts + torch.arange(path.shape[1], device=path.device)).clamp(max=self.capacity - 1)
        self.tokens[row, to] = self.tokens[row, (starts + path).clamp(max=self.capacity - 1)]

    def write_tokens(self, tokens: Tensor) -> None:
        """Store the tokens [rows, width] of the open window."""
        self.tokens[self.window.slots].scatter_(1, self.window.places, tokens)


class LengthFactors:
    """Selects the rotary factors of each row by its own length.

    threshold: the longest sequence, in tokens, that uses the short factors. rotaries: the model's rotary modules; their
    `forward` is wrapped, and behaves as before outside calls of `LengthFactors.forward`.
    """

    def __init__(self, threshold: int, rotaries: Sequence[nn.Module]) -> None:
        self.threshold = threshold
        self._is_long: Sequence[bool] | None = None  # per row of the current call
        for rotary in rotaries:
            rotary.forward = self._by_row(rotary.forward)
            rotary.length_factors = self  # type: ignore[assignment]

    def forward(
        self,
        plain: Forward,
        tokens: Tensor,
        cache: LengthCache,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        """Call `plain`, the model's forward with the same arguments, such that each position has its own factors."""
        reach = int(offsets(branches, torch.device("cpu")).max()) + 1 if branches else tokens.shape[1]
        lengths = cache.num_cached[first_slot : first_slot + len(tokens)]
        ends = [length + reach for length in lengths]
        is_long = [
            (end if last_only else length + 1) > self.threshold for end, length in zip(ends, lengths, strict=True)
        ]
        logits, places = self._run(plain, tokens, cache, first_slot, is_long, last_only, branches), cache.window.places
        for row, end in enumerate(ends):
            if end > self.threshold and not is_long[row]:
                slot, columns = first_slot + row, places[row]
                shorter = None if cache.features is None else cache.features[slot, columns]
                longer = self._run(plain, tokens[row : row + 1], cache, slot, [True], last_only, branches)
                is_beyond = (cache.window.positions[0] >= self.threshold).unsqueeze(1)
                logits[row] = torch.where(is_beyond.to(logits.device), longer[0], logits[row])
                if cache.features is not None and shorter is not None:  # those that the logits are computed from
                    cache.features[slot, columns] = torch.where(is_beyond, cache.features[slot, columns], shorter)
        return logits

    def _run(
        self,
        plain: Forward,
        tokens: Tensor,
        cache: LengthCache,
        first_slot: int,
        is_long: Sequence[bool],
        last_only: bool,
        branches: Branches | None,
    ) -> Tensor:
        """One call with the given factors per row, after recomputing cached tokens that were computed with others."""
        for slot, use_long in enumerate(is_long, first_slot):
            if cache.is_long[slot] != use_long:
                self._recompute(plain, cache, slot, use_long)
        self._is_long = is_long
        try:
            logits = plain(tokens, cache, first_slot, last_only, branches)
        finally:
            self._is_long = None
        cache.write_tokens(tokens)
        return logits

    def _recompute(self, plain: Forward, cache: LengthCache, slot: int, is_long: bool) -> None:
        cache.is_long[slot] = is_long
        tokens, cache.num_cached[slot] = cache.tokens[slot : slot + 1, : cache.num_cached[slot]].clone(), 0
        for chunk in tokens.split(min(_CHUNK, cache.max_width), 1) if tokens.numel() else ():
            self._run(plain, chunk, cache, slot, [is_long], True, None)
            cache.num_cached[slot] += chunk.shape[1]

    def _by_row(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a rotary module's forward, (hidden, positions [rows, width]) -> cos and sin [rows, width, dim]."""

        def short(hidden: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
            angles: Sequence[Tensor] = forward(hidden, positions.clamp(max=self.threshold - 1), *args, **kwargs)
            return angles

        def long(hidden: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
            beyond = positions.new_full((*positions.shape[:-1], 1), self.threshold)  # selects the long factors
            angles = forward(hidden, torch.cat([positions, beyond], -1), *args, **kwargs)
            return [table[..., :-1, :] for table in angles]

        def by_row(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:  # transformers' names
            if self._is_long is None:
                return forward(x, position_ids, *args, **kwargs)
            if len(set(self._is_long)) == 1:
                return tuple((long if self._is_long[0] else short)(x, position_ids, *args, **kwargs))
            chosen = torch.tensor(self._is_long, device=position_ids.device).view(-1, 1, 1)
            both = [select(x, position_ids, *args, **kwargs) for select in (long, short)]
            return tuple(torch.where(chosen, *pair) for pair in zip(*both, strict=True))

        return by_row


def length_factors(model: nn.Module, context_length: int) -> LengthFactors | None:
    """The length factors of a LongRoPE model with a context longer than its threshold; None for any other model.

    Raises ValueError if the thresholds of its layers differ.
    """
    rotaries = [module for module in model.modules() if "longrope" in _rope_types(module)]
    thresholds = {threshold for module in rotaries for threshold in _thresholds(module)}
    if not thresholds or min(thresholds) >= context_length:
        return None
    if len(thresholds) > 1:
        raise ValueError(f"original_max_position_embeddings={sorted(thresholds)} must be the same in all layers")
    existing: LengthFactors | None = getattr(rotaries[0], "length_factors", None)
    return existing or LengthFactors(thresholds.pop(), rotaries)


def _rope_types(module: nn.Module) -> Sequence[str]:
    types = getattr(module, "rope_type", ())
    return list(types.values()) if isinstance(types, dict) else [types] if isinstance(types, str) else ()


def _thresholds(module: Any) -> list[int]:
    parameters = module.config.rope_parameters
    groups = [parameters] if "rope_type" in parameters else parameters.values()  # one for all layers, or one per kind
    return [int(p["original_max_position_embeddings"]) for p in groups if p and p.get("rope_type") == "longrope"]
