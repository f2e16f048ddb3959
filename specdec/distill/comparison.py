"""When to copy and when to draw: prompt lookup against a drawing draft, by how long the copied text's match is."""

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

LONGEST = 8  # matches of this many tokens or more are counted together
DEPTH = 4  # tokens of a draft


@dataclass(frozen=True, slots=True)
class Comparison:
    """At positions of held-out text where the longest match has `match` tokens.

    positions: how many. lookup, draft: tokens that are accepted on average, of one proposed and of DEPTH proposed.
    """

    match: int
    positions: int
    lookup: tuple[float, float]
    draft: tuple[float, float]


def compare(student: Guesser, dataset: Dataset, temperature: float) -> list[Comparison]:
    """By length of match; texts that the target said at a temperature, and drafts verified at the same."""
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
    """(position of the last known token, longest match, copied tokens that come true) along a text's continuation."""
    indices = [LookupIndex(size, size) for size in range(1, LONGEST + 1)]
    for known in range(start, len(tokens) - depth):
        guesses = [index.continuation(list(tokens[:known]), depth) for index in indices]
        match = max((size for size, guess in enumerate(guesses, 1) if guess), default=0)
        guess = guesses[match - 1] if match else []
        pairs = zip(guess, tokens[known : known + depth], strict=False)
        come_true = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(guess))
        yield known - 1, match, come_true
