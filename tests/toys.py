"""Markov pairs whose every threshold lies on a small grid, so that a grid of uniforms gives their exact law."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.models.markov import MarkovModel

# Quarters, such that target/draft is 0, 1/2, 1 or more and every residual is made of halves.
QUARTERS = torch.tensor([[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 0], [0, 2, 2], [2, 0, 2]]).double() / 4


def table(seed: int, rows: Tensor = QUARTERS) -> Tensor:
    """A table [vocab, vocab, vocab] whose rows are chosen at random from the given laws."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = rows.shape[1]
    return rows[torch.randint(len(rows), (vocab_size, vocab_size), generator=generator)]


def grid_pair(seed: int) -> tuple[MarkovModel, MarkovModel]:
    """(target, draft) over three tokens, both on the grid of quarters."""
    return MarkovModel(table(2 * seed)), MarkovModel(table(2 * seed + 1))


def top_k_law(row: Tensor, k: int) -> Tensor:
    """A law cut to its k largest probabilities, ties with the k-th included; k = 0 keeps all."""
    kept = row * (row >= row.sort(descending=True).values[k - 1]) if k else row
    return kept / kept.sum()


def joint_law(
    model: MarkovModel, prompt: Sequence[int], num_tokens: int, transform=lambda law: law
) -> dict[tuple[int, ...], float]:
    """Exact law of the next num_tokens tokens: {tokens: probability}; `transform` is applied to each row."""
    law = {}
    for tokens in itertools.product(range(model.vocab_size), repeat=num_tokens):
        context, probability = [0, *prompt], 1.0
        for token in tokens:
            probability *= transform(model.table[context[-2], context[-1]])[token].item()
            context.append(token)
        if probability:
            law[tokens] = probability
    return law
