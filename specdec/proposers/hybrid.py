"""Combines two proposers: copies tokens if there is a match, else draws them with a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import CopyingProposer, Proposer
from specdec.proposers.ngram import pad
from specdec.proposers.suffix import Copy, SuffixProposer, cut_together
from specdec.requests import Batch, Generation
from specdec.sampling.distributions import Dense, Distribution, OneHot
from specdec.verification import Draft

_DRAWN_PRIOR = (2.0, 4.0)  # prior counts of a row's drawn drafts: tokens accepted, tokens tested


class Lookup(Protocol):
    """The source of a hybrid's copies, such as `NgramProposer`."""

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The tokens to copy in each row, at most limits[r]; none if the row's draft should be drawn."""
        ...

    def forget(self) -> None:
        """Drop the state of finished requests."""
        ...


@dataclass(slots=True)
class _Drawn:
    """Acceptance statistics of a row's drawn drafts. step: number of the last step, if it is not counted yet."""

    accepted: float = _DRAWN_PRIOR[0]
    tested: float = _DRAWN_PRIOR[1]
    step: int | None = None

    def reach(self, limit: int) -> list[float]:
        """For each token of a drawn draft, the estimated probability that it and all before it are accepted."""
        return [(self.accepted / self.tested) ** number for number in range(1, limit + 1)]

    def observe(self, row: Generation) -> None:
        if self.step is not None and self.step < len(row.steps):
            step = row.steps[self.step]
            self.accepted += step.num_accepted
            self.tested += min(step.num_accepted + 1, step.num_drafted)
            self.step = None


class BetterCopies:
    """Copies with a larger expected gain than a drawn draft, estimated from the row's past steps and measured costs.

    The choice is made before the draft is drawn, from committed tokens and past steps: a choice that depended on the
    drawn draft would change its distribution.
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
        """Whether a copy has at least the expected gain of a drawn draft, assuming that all rows are alike."""
        drawn = self._drawn[row]
        drawn.observe(row)
        if not self._adaptive:
            return bool(copy.tokens) and copy.score >= sum(drawn.reach(limit))
        _, copied_gain = self._adaptive.best_length([num_rows * p for p in copy.reach], num_rows)
        _, drawn_gain = self._adaptive.best_length([num_rows * p for p in drawn.reach(limit)], num_rows, drawn=True)
        return copied_gain > 0 and copied_gain >= drawn_gain


class HybridProposer(CopyingProposer):
    """Drafts each row with `lookup` if it has a guess, else with `fallback`.

    The choice depends only on committed tokens, so the declared distribution remains that of the drafted tokens.
    max_fallback_tokens: maximum length of the fallback's drafts, which cost time; None for no limit.
    """

    def __init__(self, lookup: Lookup, fallback: Proposer, max_fallback_tokens: int | None = None) -> None:
        self._lookup, self._fallback, self._max_fallback_tokens = lookup, fallback, max_fallback_tokens
        self.feature_layers = fallback.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        guesses = self.guess(batch, limits)
        return self.complete(batch, limits, guesses) or _copied(batch, guesses)

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The tokens that `lookup` copies in each row."""
        return self._lookup.guess(batch, limits)

    def complete(self, batch: Batch, limits: Sequence[int], guesses: Sequence[Sequence[int]]) -> Draft | None:
        """These copies beside what `fallback` draws in rows without one; None if it draws nothing."""
        cap = self._max_fallback_tokens if self._max_fallback_tokens is not None else max(limits)
        drawn_limits = [0 if guess else min(limit, cap) for guess, limit in zip(guesses, limits, strict=True)]
        if not any(drawn_limits):
            return None
        drawn = self._fallback.propose(batch, drawn_limits)
        if not any(guesses):
            return drawn
        return _merged(_copied(batch, guesses), drawn) if drawn.tokens.shape[1] else None

    def forget(self) -> None:
        self._lookup.forget()
        self._fallback.forget()


def _copied(batch: Batch, guesses: Sequence[Sequence[int]]) -> Draft:
    """The draft of these tokens in each row."""
    width = batch.width(max(map(len, guesses)))
    return Draft.deterministic(*pad(guesses, batch.sampling.device, width), batch.sampling.vocab_size)


def _merged(copied: Draft, drawn: Draft) -> Draft:
    """The rows of `copied` that propose something, the others of `drawn`."""
    from_copied = copied.num_proposed > 0
    width = max(copied.tokens.shape[1], drawn.tokens.shape[1])
    copied, drawn = _widened(copied, width), _widened(drawn, width)
    rows = from_copied[:, None]
    distribution: Distribution
    if isinstance(copied.distribution, OneHot) and isinstance(drawn.distribution, OneHot):
        distribution = OneHot(
            torch.where(rows, copied.distribution.tokens, drawn.distribution.tokens), copied.distribution.vocab_size
        )
    else:
        distribution = Dense(torch.where(rows[..., None], copied.distribution.dense(), drawn.distribution.dense()))
    return Draft(
        torch.where(rows, copied.tokens, drawn.tokens),
        torch.where(from_copied, copied.num_proposed, drawn.num_proposed),
        distribution,
        finite=drawn.finite,
    )


def _widened(draft: Draft, width: int) -> Draft:
    """The draft padded to a width."""
    columns = torch.arange(width, device=draft.tokens.device).clamp(max=draft.tokens.shape[1] - 1)
    finite = None if draft.finite is None else draft.finite[:, columns]
    return Draft(draft.tokens[:, columns], draft.num_proposed, draft.distribution[:, columns], finite=finite)
