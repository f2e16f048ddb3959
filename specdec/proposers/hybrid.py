"""Copy where there is something to copy, else draw: a free deterministic proposer first, then one that costs time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import Proposer
from specdec.proposers.ngram import pad
from specdec.proposers.suffix import Copy, SuffixProposer, cut_together
from specdec.requests import Batch, Generation
from specdec.sampling.distributions import Dense, Distribution, OneHot
from specdec.verification import Draft

_DRAWN_PRIOR = (2.0, 4.0)  # tokens accepted of tokens looked at, of a row's drawn drafts before it had any


class Lookup(Protocol):
    """What a hybrid copies from; `NgramProposer` is one."""

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The tokens to copy in each row, at most limits[r]; none where the row's draft is rather to be drawn."""
        ...

    def forget(self) -> None:
        """Drop what is kept of finished requests."""
        ...


@dataclass(slots=True)
class _Drawn:
    """What became of a row's drawn drafts. step: the number of the last one's step, if it is not counted yet."""

    accepted: float = _DRAWN_PRIOR[0]
    looked_at: float = _DRAWN_PRIOR[1]
    step: int | None = None

    def reach(self, limit: int) -> list[float]:
        """The probability that verification comes so far in a drawn draft, expected, for each of its tokens."""
        return [(self.accepted / self.looked_at) ** number for number in range(1, limit + 1)]

    def observe(self, row: Generation) -> None:
        if self.step is not None and self.step < len(row.steps):
            step = row.steps[self.step]
            self.accepted += step.num_accepted
            self.looked_at += min(step.num_accepted + 1, step.num_drafted)
            self.step = None


class BetterCopies:
    """Copies that are expected to bring more tokens than a drawn draft, by the row's own past; above their costs,
    where these are known.

    A row's choice is made before anything is drawn, by committed tokens and by what became of past steps: a choice
    that looked at the drawn draft would change its distribution.
    """

    def __init__(self, copier: SuffixProposer, adaptive: AdaptiveLength | None = None) -> None:
        self.copier, self._adaptive = copier, adaptive
        self._drawn: dict[Generation, _Drawn] = {}

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """See `Lookup`."""
        copies = self.copier.copies(batch, limits)
        self._drawn = {row: self._drawn.get(row) or _Drawn() for row in batch.rows if row is not None}
        num_rows = len(self._drawn)
        chosen = [
            copy if row and limit and self._is_better(row, copy, limit, num_rows) else Copy()
            for row, copy, limit in zip(batch.rows, copies, limits, strict=True)
        ]
        if self._adaptive:
            chosen = cut_together(chosen, num_rows, self._adaptive)
        for row, copy, limit in zip(batch.rows, chosen, limits, strict=True):
            if row and limit and not copy.tokens:
                self._drawn[row].step = len(row.steps)
        return [list(copy.tokens) for copy in chosen]

    def forget(self) -> None:
        """See `Lookup`."""
        self.copier.forget()

    def _is_better(self, row: Generation, copy: Copy, limit: int, num_rows: int) -> bool:
        """Whether a copy brings more than a drawn draft would, all rows of the step being taken to be alike."""
        drawn = self._drawn[row]
        drawn.observe(row)
        if not self._adaptive:
            return bool(copy.tokens) and copy.score >= sum(drawn.reach(limit))
        _, gain = self._adaptive.best_length([num_rows * each for each in copy.reach], num_rows)
        _, least = self._adaptive.best_length([num_rows * each for each in drawn.reach(limit)], num_rows, drawn=True)
        return gain > 0 and gain >= least


class HybridProposer(Proposer):
    """Each row's draft comes from `lookup` where it has a guess, else from `fallback`.

    Which of the two speaks depends on committed tokens only, so either's distribution is the distribution that its
    tokens are drawn from. max_fallback_tokens: limit to the fallback's drafts, which cost time; None for none.
    """

    def __init__(self, lookup: Lookup, fallback: Proposer, max_fallback_tokens: int | None = None) -> None:
        self._lookup, self._fallback, self._max_fallback_tokens = lookup, fallback, max_fallback_tokens
        self.feature_layers = fallback.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        guesses = self._lookup.guess(batch, limits)
        cap = self._max_fallback_tokens if self._max_fallback_tokens is not None else max(limits)
        drawn_limits = [0 if guess else min(limit, cap) for guess, limit in zip(guesses, limits, strict=True)]
        vocab_size = batch.sampling.vocab_size
        width = batch.width(max(map(len, guesses)))
        copied = Draft.deterministic(*pad(guesses, batch.sampling.device, width), vocab_size)
        if not any(drawn_limits):
            return copied
        drawn = self._fallback.propose(batch, drawn_limits)
        if not any(guesses):
            return drawn
        return _merged(copied, drawn) if drawn.tokens.shape[1] else copied  # it may have drawn nothing

    def forget(self) -> None:
        self._lookup.forget()
        self._fallback.forget()


def _merged(copied: Draft, drawn: Draft) -> Draft:
    """The rows of `copied` that propose something, the others of `drawn`."""
    from_copied = copied.num_proposed > 0
    width = max(copied.tokens.shape[1], drawn.tokens.shape[1])
    mine, theirs = _widened(copied, width), _widened(drawn, width)
    rows = from_copied[:, None]
    distribution: Distribution
    if isinstance(mine.distribution, OneHot) and isinstance(theirs.distribution, OneHot):
        distribution = OneHot(
            torch.where(rows, mine.distribution.tokens, theirs.distribution.tokens), mine.distribution.vocab_size
        )
    else:
        distribution = Dense(torch.where(rows[..., None], mine.distribution.dense(), theirs.distribution.dense()))
    return Draft(
        torch.where(rows, mine.tokens, theirs.tokens),
        torch.where(from_copied, mine.num_proposed, theirs.num_proposed),
        distribution,
        finite=theirs.finite,
    )


def _widened(draft: Draft, width: int) -> Draft:
    """The same draft with more padding."""
    columns = torch.arange(width, device=draft.tokens.device).clamp(max=draft.tokens.shape[1] - 1)
    finite = None if draft.finite is None else draft.finite[:, columns]
    return Draft(draft.tokens[:, columns], draft.num_proposed, draft.distribution[:, columns], finite=finite)
