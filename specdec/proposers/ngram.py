"""Drafts copied from the request's own text: prompt lookup, and an online store of n-gram counts.

Both look only at the prompt and at emitted tokens, cost a constant time per token, and are deterministic: their
distribution is one-hot, which makes them exact at every temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.base import CopyingProposer
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.verification import Draft

Ngram = tuple[int, ...]


class TokenIndex(Protocol):
    """Predicts the continuation of a growing list of tokens."""

    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens; `tokens` is the list of the last call with more appended."""
        ...


class LookupIndex:
    """Prompt lookup (Saxena 2023): find where the longest suffix of the text occurred last, and copy what followed.

    min_ngram, max_ngram: the shortest and longest suffix that counts as a match, in tokens. Raises ValueError unless
    1 <= min_ngram <= max_ngram.
    A copy that reaches the end of the text goes on into itself, so that a repeating text is continued as repeating.
    """

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4) -> None:
        self._sizes = _sizes(min_ngram, max_ngram)
        self._follows: dict[Ngram, int] = {}  # n-gram -> position of the token after its most recent occurrence
        self._num_indexed = 0

    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        # n-grams that end before the last token: the suffix itself must not match itself
        for end in range(self._num_indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._follows[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        for size in self._sizes:
            start = self._follows.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if start is not None:
                period = len(tokens) - start
                return [tokens[start + i % period] for i in range(limit)]
        return []


class CountIndex:
    """Online n-gram store (Ou et al. 2024, arXiv:2404.08698): the commonest next token of the longest known context.

    min_ngram, max_ngram: context lengths to back off between, long to short. Ties go to the more recent token.
    A draft ends where no context is known.
    """

    def __init__(self, min_ngram: int = 2, max_ngram: int = 4) -> None:
        self._sizes = _sizes(min_ngram, max_ngram)
        self._counts: dict[Ngram, dict[int, int]] = {}
        self._best: dict[Ngram, int] = {}
        self._num_indexed = 0

    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        for end in range(self._num_indexed, len(tokens)):
            self._count(tokens, end)
        self._num_indexed = len(tokens)
        text = tokens[-self._sizes.start :]
        num_known = len(text)
        while len(text) - num_known < limit:
            token = self._most_frequent(text)
            if token is None:
                break
            text.append(token)
        return text[num_known:]

    def _count(self, tokens: list[int], end: int) -> None:
        token = tokens[end]
        for size in self._sizes:
            if size <= end:
                context = tuple(tokens[end - size : end])
                counts = self._counts.setdefault(context, {})
                counts[token] = counts.get(token, 0) + 1
                if counts[token] >= counts.get(self._best.get(context, token), 0):
                    self._best[context] = token

    def _most_frequent(self, text: list[int]) -> int | None:
        for size in self._sizes:
            token = self._best.get(tuple(text[-size:])) if size <= len(text) else None
            if token is not None:
                return token
        return None


def _sizes(min_ngram: int, max_ngram: int) -> range:
    if not 1 <= min_ngram <= max_ngram:
        raise ValueError(f"min_ngram={min_ngram} must be at least 1 and at most max_ngram={max_ngram}")
    return range(max_ngram, min_ngram - 1, -1)


class NgramProposer(CopyingProposer):
    """Proposes the continuations found by an index of each request's own tokens.

    new_index: creates the index of a request. adaptive: limits the length by observed acceptance; None for no limit.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        new_index: Callable[[], TokenIndex] = LookupIndex,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        self._new_index, self._adaptive = new_index, adaptive
        self._pending: list[tuple[Generation, int, int]] = []  # row, number of its step, tokens that it copied
        self._vocab_size, self._device = vocab_size, device
        self._indices: dict[Generation, TokenIndex] = {}

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        guesses = self.guess(batch, limits)
        width = batch.width(max(map(len, guesses)))
        return Draft.deterministic(*pad(guesses, self._device, width), self._vocab_size)

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The proposed tokens of each row, up to the first one that a constraint forbids; none without a match."""
        old = self._indices
        self._indices = {row: old.get(row) or self._new_index() for row in batch.rows if row is not None}
        guesses = [
            self._indices[row].continuation(row.tokens, limit) if row and limit else []
            for row, limit in zip(batch.rows, limits, strict=True)
        ]
        guesses = [guess[: batch.sampling.num_allowed(index, guess)] for index, guess in enumerate(guesses)]
        return self._cut(guesses, batch.rows, self._adaptive) if self._adaptive else guesses

    def _cut(
        self, guesses: Sequence[list[int]], rows: Sequence[Generation | None], adaptive: AdaptiveLength
    ) -> list[list[int]]:
        """Truncate the guesses to the length that is worth verifying, by the acceptance of earlier ones."""
        for row, number, num_copied in self._pending:
            if number < len(row.steps):
                adaptive.observe_copy(num_copied, min(row.steps[number].num_accepted, num_copied))
        length = adaptive.num_copied([len(guess) for guess in guesses if guess], sum(row is not None for row in rows))
        kept = [guess[:length] for guess in guesses]
        self._pending = [
            (row, len(row.steps), len(copied))
            for row, guess, copied in zip(rows, guesses, kept, strict=True)
            if row and guess
        ]
        return kept


def pad(rows: Sequence[Sequence[int]], device: torch.device, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Convert lists of token ids to a tensor int64 [rows, width], padded with 0, and their lengths, int64 [rows].

    width: the longest list's length if None.
    """
    if width is None:
        width = max(map(len, rows))
    tokens = upload([[*row, *[0] * (width - len(row))] for row in rows], device)
    return tokens.view(len(rows), width), upload([len(row) for row in rows], device)
