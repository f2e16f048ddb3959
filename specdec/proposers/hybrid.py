"""Copy where there is something to copy, else draw: a free deterministic proposer first, then one that costs time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdec.proposers import Proposer
from specdec.proposers.ngram import NgramProposer, pad
from specdec.requests import Batch
from specdec.sampling import Dense, Law, OneHot
from specdec.verification import Draft


class HybridProposer:
    """Each row's draft comes from `lookup` where it has a guess, else from `fallback`.

    Which of the two speaks depends on committed tokens only, so either's law is the law that its tokens are drawn
    from. lookup: how long a match must be is its own min_ngram. max_fallback_tokens: limit to the fallback's drafts,
    which cost time; None for none.
    """

    def __init__(self, lookup: NgramProposer, fallback: Proposer, max_fallback_tokens: int | None = None) -> None:
        self._lookup, self._fallback, self._max_fallback_tokens = lookup, fallback, max_fallback_tokens
        self.needs_features = getattr(fallback, "needs_features", False)

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


def _merged(copied: Draft, drawn: Draft) -> Draft:
    """The rows of `copied` that propose something, the others of `drawn`."""
    from_copied = copied.lengths > 0
    width = max(copied.tokens.shape[1], drawn.tokens.shape[1])
    mine, theirs = _widened(copied, width), _widened(drawn, width)
    rows = from_copied[:, None]
    law: Law
    if isinstance(mine.law, OneHot) and isinstance(theirs.law, OneHot):
        law = OneHot(torch.where(rows, mine.law.tokens, theirs.law.tokens), mine.law.vocab_size)
    else:
        law = Dense(torch.where(rows[..., None], mine.law.dense(), theirs.law.dense()))
    return Draft(
        torch.where(rows, mine.tokens, theirs.tokens), torch.where(from_copied, mine.lengths, theirs.lengths), law
    )


def _widened(draft: Draft, width: int) -> Draft:
    """The same draft with more padding."""
    columns = torch.arange(width, device=draft.tokens.device).clamp(max=draft.tokens.shape[1] - 1)
    return Draft(draft.tokens[:, columns], draft.lengths, draft.law[:, columns])
