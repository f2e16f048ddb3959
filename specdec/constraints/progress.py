"""Constrained decoding: a language as a state machine over tokens, and the progress of an output in it.

States are immutable values: following draft tokens creates new states, so a rejection leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_MAX_STATES = 500  # to search; each costs microseconds, sometimes milliseconds, in a real grammar


class Constraint(Protocol):
    """A language over tokens. See `constraints.llguidance` for JSON schemas, regular expressions and grammars."""

    def start(self) -> Any:
        """The state before the first token; never None."""
        ...

    def allowed(self, state: Any) -> Tensor:
        """The tokens allowed next, bool [vocab] on the host; stop tokens exactly where the text is complete.

        All False is a dead end.
        """
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state after an allowed token, or None after a stop token. The given state is not modified."""
        ...


class DeadEndError(ValueError):
    """An output that its constraint allows neither to continue nor to end."""


class Progress:
    """The progress of one output in its constraint.

    States after draft tokens are computed once and kept while those tokens may still be emitted.
    """

    def __init__(self, constraint: Constraint, output: Sequence[int] = ()) -> None:
        self._constraint, self._num_emitted = constraint, 0
        self._states: dict[tuple[int, ...], Any] = {(): constraint.start()}  # by the tokens after the emitted ones
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self.emit(output)

    def allowed_after(self, drafted: tuple[int, ...] = ()) -> Tensor | None:
        """The tokens allowed next, bool [vocab], or None where nothing can be emitted anyway.

        That is after a stop token, after a token that is not allowed, and in a dead end of the draft.
        Raises DeadEndError if the emitted tokens lead to a dead end.
        """
        state = self._state_after(drafted)
        mask = None if state is None else self._mask(drafted, state)
        if mask is None or mask.any():
            return mask
        if drafted:
            return None
        raise DeadEndError(
            f"{self._constraint} allows neither a next token nor an end after {self._num_emitted} emitted tokens; "
            "correct it"
        )

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """The number of leading tokens that are allowed next; nothing is allowed after a stop token."""
        for number, token in enumerate(tokens):
            mask = self.allowed_after(tuple(tokens[:number]))
            if mask is None or not mask[token]:
                return number
        return len(tokens)

    def emit(self, tokens: Sequence[int]) -> None:
        """Advance by emitted tokens. Raises DeadEndError like `allowed_after`."""
        for token in tokens:
            self.allowed_after()
            self._state_after((token,))
            self._states, self._masks = _after(token, self._states), _after(token, self._masks)
            self._num_emitted += 1

    def _state_after(self, drafted: tuple[int, ...]) -> Any:
        if drafted not in self._states:
            before, token = self._state_after(drafted[:-1]), drafted[-1]
            is_allowed = before is not None and bool(self._mask(drafted[:-1], before)[token])
            self._states[drafted] = self._constraint.advance(before, token) if is_allowed else None
        return self._states[drafted]

    def _mask(self, drafted: tuple[int, ...], state: Any) -> Tensor:
        if drafted not in self._masks:
            self._masks[drafted] = self._constraint.allowed(state)
        return self._masks[drafted]


def _after(token: int, known: dict[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
    """The entries whose keys start with a token, keyed by the rest."""
    return {text[1:]: value for text, value in known.items() if text[:1] == (token,)}


def masks(
    rows: Sequence[Progress | None],
    drafted: Tensor | None,
    num_positions: int,
    vocab_size: int,
    lineage: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The tokens allowed at the last n of the positions after 0, 1, ..., m draft tokens: bool [rows, n, vocab], host.

    rows: None for an unconstrained row. drafted: int64 [rows, m] with m >= n - 1, or None for m = 0; waits for its
    device. lineage: for a tree, the indices of the draft tokens before each position.
    """
    drafts = [[]] * len(rows) if drafted is None else drafted.tolist()
    allowed = torch.ones(len(rows), num_positions, vocab_size, dtype=torch.bool)
    for row, (progress, draft) in enumerate(zip(rows, drafts, strict=True)):
        if progress is None:
            continue
        for position in range(num_positions):
            before = lineage[position] if lineage else range(len(draft) - num_positions + 1 + position)
            mask = progress.allowed_after(tuple(draft[i] for i in before))
            if mask is not None:
                allowed[row, position] = mask
    return allowed


def fewest_tokens(constraint: Constraint, stop_token_ids: frozenset[int], most: int) -> int:
    """A lower bound on the length of a complete output, including the stop token; most + 1 if it exceeds `most`.

    It is exact if a bounded search reaches it.
    """
    return least_length(constraint, stop_token_ids, most)[0]


def least_length(constraint: Constraint, stop_token_ids: frozenset[int], most: int) -> tuple[int, bool]:
    """`fewest_tokens`, and whether a complete output of that length is known to exist."""
    states, num_searched = [constraint.start()], 0
    for length in range(1, most + 1):
        allowed = [constraint.allowed(state).nonzero().squeeze(1).tolist() for state in states]
        if not all(map(stop_token_ids.isdisjoint, allowed)):
            return length, True
        num_searched += sum(map(len, allowed))
        if num_searched > _MAX_STATES:
            return length + 1, False
        states = [
            constraint.advance(state, token) for state, tokens in zip(states, allowed, strict=True) for token in tokens
        ]
    return most + 1, False
