"""A toy language model with a known distribution, for exact tests: a Markov chain of order two.

The next-token distribution depends on the last token and, *read back from the cache*, on the one before. So a stale
cache, a wrong row or a wrong position changes the output distribution and is detected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.models.base import MAX_ROLLBACK, FeatureLayers, LanguageModel
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches


@dataclass(slots=True, eq=False)
class MarkovCache:
    """Tokens by slot and position: int64 [slots, capacity]."""

    tokens: Tensor
    features: Tensor | None = None
    num_cached: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_cached = [0] * len(self.tokens)

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    max_width = 1 << 30

    def reserve(self, first_slot: int, starts: Sequence[int], width: int) -> int:
        return self.capacity

    def holds(self, slot: int, num_tokens: int) -> bool:
        return True

    def copy_slot(self, source: int, slot: int, num_tokens: int) -> None:
        self.tokens[slot, :num_tokens] = self.tokens[source, :num_tokens]
        if self.features is not None:
            self.features[slot, :num_tokens] = self.features[source, :num_tokens]
        self.num_cached[slot] = num_tokens

    def keep(self, starts: Tensor, path: Tensor) -> None:
        for block in [self.tokens] if self.features is None else [self.tokens, self.features]:
            row, places = torch.arange(len(path)).unsqueeze(1), torch.arange(path.shape[1])
            block[row, starts.unsqueeze(1) + places] = block[row, starts.unsqueeze(1) + path]


class MarkovModel(LanguageModel):
    """Next-token distributions from a table.

    table: float64 [vocab, vocab, vocab]; table[a, b] is the distribution after tokens a, b. At the start of a sequence,
    a is token 0. Raises ValueError unless each row is a distribution.
    """

    def __init__(self, table: Tensor, context_length: int = 1 << 20) -> None:
        if table.ndim != 3 or len(set(table.shape)) != 1:
            raise ValueError(f"table of shape {tuple(table.shape)} must be [vocab, vocab, vocab]")
        if (table < 0).any() or not torch.allclose(table.sum(-1), torch.ones_like(table[..., 0])):
            raise ValueError("table must have rows >= 0 that sum to 1")
        self.table = table.double()
        self.vocab_size, self.context_length, self.device = len(table), context_length, table.device

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> MarkovCache:
        if features:
            raise ValueError(
                f"features={features} must be () for a Markov table, which has no hidden states; use a method without "
                "a head, such as ngram"
            )
        return MarkovCache(torch.zeros(num_slots, capacity, dtype=torch.int64, device=self.device))

    def forward(
        self,
        tokens: Tensor,
        cache: MarkovCache,
        first_slot: int = 0,
        last_only: bool = False,
        branches: Branches | None = None,
    ) -> Tensor:
        starts = upload(cache.num_cached[first_slot : first_slot + len(tokens)], self.device)
        logits = self.forward_at(tokens, starts, cache, cache.capacity, first_slot, branches=branches)
        return logits[:, -1:] if last_only else logits

    def forward_at(
        self,
        tokens: Tensor,
        starts: Tensor,
        cache: MarkovCache,
        extent: int,
        first_slot: int = 0,
        last: Tensor | None = None,
        branches: Branches | None = None,
    ) -> Tensor:
        first = branches.first if branches else 0
        columns = torch.arange(first, first + tokens.shape[1], device=self.device)
        before = columns - 1 if branches is None else torch.tensor(branches.parents[first:], device=self.device)
        places, before = ((starts.unsqueeze(1) + each).clamp(max=cache.capacity - 1) for each in (columns, before))
        stored = cache.tokens[first_slot : first_slot + len(tokens)]
        stored.scatter_(1, places, tokens)  # padding may lie beyond the end
        previous = torch.where(before >= 0, stored.gather(1, before.clamp(min=0)), 0)
        logits = self.table[previous, stored.gather(1, places)].log()
        return logits if last is None else logits[:, last]
