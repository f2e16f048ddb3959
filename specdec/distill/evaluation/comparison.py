"""Prompt lookup against a sampling draft, by the length of the match: when is copying better?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from specdec.distill.dataset import Dataset
from specdec.distill.students import Guesser
from specdec.distill.training import accepted_ahead
from specdec.proposers.ngram import LookupIndex

LONGEST = 8  # matches of at least this many tokens are counted together
DEPTH = 4  # tokens per draft


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results over the positions of held-out text whose longest match has `match` tokens.

    positions: their number. lookup, draft: mean accepted tokens of one proposed and of DEPTH proposed.
    """

    match: int
    positions: int
    lookup: tuple[float, float]
    draft: tuple[float, float]


def compare(student: Guesser, dataset: Dataset, temperature: float) -> list[Comparison]:
    """One comparison per match length, on texts the target generated at a temperature, verified at the same."""
    sums: dict[int, Any] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for index in dataset.held_out(temperature):
        batch = dataset.batch([index])
        tokens, start = batch.tokens[0].tolist(), int(batch.starts[0])
        drawn = accepted_ahead(student, batch, temperature, DEPTH)
        for position, match, copied in copies(tokens, start, DEPTH):
            one, all_ = float(copied > 0), float(copied)
            sums[match] += torch.tensor([1, one, all_, drawn[0][position], drawn[:, position].sum()])
    return [
        Comparison(match, round(n), (one / n, all_ / n), (drawn_one / n, drawn_all / n))
        for match, (n, one, all_, drawn_one, drawn_all) in sorted((m, v.tolist()) for m, v in sums.items())
    ]


def copies(tokens: Sequence[int], start: int, depth: int) -> Iterator[tuple[int, int, int]]:
    """(position of the last known token, longest match, correctly copied tokens) along a text's continuation."""
    indices = [LookupIndex(size, size) for size in range(1, LONGEST + 1)]
    for known in range(start, len(tokens) - depth):
        guesses = [index.continuation(list(tokens[:known]), depth) for index in indices]
        match = max((size for size, guess in enumerate(guesses, 1) if guess), default=0)
        guess = guesses[match - 1] if match else []
        pairs = zip(guess, tokens[known : known + depth], strict=False)
        num_correct = next((i for i, (copied, token) in enumerate(pairs) if copied != token), len(guess))
        yield known - 1, match, num_correct
