"""Toy models for proofs: every threshold lies on a small grid, so that a grid of uniforms gives exact distributions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from specdec.heads.base import Drafting
from specdec.models.base import FINAL, MAX_ROLLBACK, FeatureLayers
from specdec.models.markov import MarkovCache, MarkovModel
from specdec.trees.columns import Branches

# Quarters, such that target/draft is 0, 1/2, 1 or more and every residual is made of halves.
QUARTERS = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 0], [0, 2, 2], [2, 0, 2]]).double() / 4
HALVES = QUARTERS[3:]  # such that a grid of two points will do for accepting and for the last token


def table(seed: int, rows: Tensor = QUARTERS) -> Tensor:
    """A table [vocab, vocab, vocab] whose rows are chosen at random from the given distributions."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = rows.shape[1]
    return rows[torch.randint(len(rows), (vocab_size, vocab_size), generator=generator)]


def grid_pair(seed: int) -> tuple[MarkovModel, MarkovModel]:
    """(target, draft) over three tokens, both on the grid of quarters."""
    return MarkovModel(table(2 * seed)), MarkovModel(table(2 * seed + 1))


class FeatureTarget(MarkovModel):
    """A Markov model whose feature of a token is its code: previous token times vocabulary size, plus itself."""

    def allocate(
        self, num_slots: int, capacity: int, *, features: FeatureLayers = (), max_rollback: int = MAX_ROLLBACK
    ) -> MarkovCache:
        cache = super().allocate(num_slots, capacity)
        cache.features = torch.full((num_slots, capacity, 1), -1.0) if features else None
        return cache

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
        logits = super().forward_at(tokens, starts, cache, extent, first_slot, last, branches)
        if cache.features is not None:
            slots, columns = slice(first_slot, first_slot + len(tokens)), torch.arange(tokens.shape[1])
            before = columns - 1 if branches is None else torch.tensor(branches.parents)
            places, before = ((starts.unsqueeze(1) + each).clamp(max=cache.capacity - 1) for each in (columns, before))
            previous = torch.where(before >= 0, cache.tokens[slots].gather(1, before.clamp(min=0)), 0)
            codes = (previous * self.vocab_size + tokens).float()
            cache.features[slots, :, 0] = cache.features[slots, :, 0].scatter(1, places, codes)
        return logits


class ToyHead:
    """A head for FeatureTarget: it reads the token before from the feature, and so is wrong if that is another's."""

    format = "eagle"
    drafting: Drafting = "sequential"
    max_tokens: int | None = None
    feature_layers: FeatureLayers = (FINAL,)

    def __init__(self, model: MarkovModel) -> None:
        self.table, self.vocab_size, self.device = model.table, model.vocab_size, model.device
        self.draft_vocabulary, self.rates = torch.arange(self.vocab_size), None
        self.num_fed = 0

    def encode(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def allocate(self, num_slots: int, capacity: int) -> MarkovCache:
        return MarkovCache(torch.zeros(num_slots, capacity, dtype=torch.int64))

    def forward(
        self,
        features: Tensor,
        tokens: Tensor,
        cache: MarkovCache,
        first_slot: int = 0,
        branches: Branches | None = None,
    ) -> Tensor:
        self.num_fed += tokens.numel()
        return features % self.vocab_size * self.vocab_size + tokens.unsqueeze(-1)

    def forward_at(
        self,
        features: Tensor,
        tokens: Tensor,
        starts: Tensor,
        cache: MarkovCache,
        extent: int,
        branches: Branches | None = None,
    ) -> Tensor:
        return self.forward(features, tokens, cache)

    def logits(self, features: Tensor) -> Tensor:
        code = features.squeeze(-1).long()
        return self.table[code // self.vocab_size, code % self.vocab_size].log()


def next_distribution(model: MarkovModel, tokens: Sequence[int]) -> Tensor:
    """Distribution of the token after a text, float64 [vocab]."""
    previous, last = [0, *tokens][-2:]
    return model.table[previous, last]


def joint_distribution(
    model: MarkovModel,
    prompt: Sequence[int],
    num_tokens: int,
    transform: Callable[[Tensor], Tensor] = lambda row: row,
    stop_token_ids: Collection[int] = (),
) -> dict[tuple[int, ...], float]:
    """Exact distribution of the next num_tokens tokens, fewer after a stop token: {tokens: probability}.

    transform: applied to each row, float64 [vocab], of the table.
    """
    ended: dict[tuple[int, ...], float] = {}
    going: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        longer = {
            (*output, token): probability * each
            for output, probability in going.items()
            for token, each in enumerate(transform(next_distribution(model, (*prompt, *output))).tolist())
            if each
        }
        ended |= {output: each for output, each in longer.items() if output[-1] in stop_token_ids}
        going = {output: each for output, each in longer.items() if output[-1] not in stop_token_ids}
    return ended | going
