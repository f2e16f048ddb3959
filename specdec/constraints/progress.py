"""What an output may say, token by token: a language as a state machine, and where an output stands in it.

States are values: following drafted tokens makes new ones and leaves the output's own as it is. So a rejected token
leaves nothing to undo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_MAX_LOOKED_AT = 500  # states, each of which costs microseconds, and at times milliseconds, in a real grammar


class Constraint(Protocol):
    """A language over tokens; `llguidance` beside this file makes those of JSON schemas, expressions and grammars."""

    def start(self) -> Any:
        """The state before the first token; never None."""
        ...

    def allowed(self, state: Any) -> Tensor:
        """The tokens that may come next, bool [vocab] on the host; stop tokens where the text is complete, only there.

        None at all is a dead end.
        """
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state after an allowed token, the given one being left as it is; None behind a stop token."""
        ...


class DeadEndError(ValueError):
    """An output that its constraint lets neither go on nor end."""


class Progress:
    """How far one output has come in its constraint.

    Where drafted tokens would lead is found out once, and kept for as long as they may still be emitted.
    """

    def __init__(self, constraint: Constraint, output: Sequence[int] = ()) -> None:
        self._constraint, self._num_emitted = constraint, 0
        self._states: dict[tuple[int, ...], Any] = {(): constraint.start()}  # by the tokens behind the emitted ones
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self.emit(output)

    def allowed_after(self, drafted: tuple[int, ...] = ()) -> Tensor | None:
        """The tokens that may come next, bool [vocab]; None where nothing is asked, as nothing there can be emitted.

        That is so behind a stop token, behind a token that is not allowed, and in a dead end of the draft.
        Raises DeadEndError if the emitted tokens have led to one.
        """
        state = self._state_after(drafted)
        mask = None if state is None else self._mask(drafted, state)
        if mask is None or mask.any():
            return mask
        if drafted:
            return None
        raise DeadEndError(
            f"{self._constraint} has neither a next token nor an end behind the {self._num_emitted} tokens emitted; "
            "correct it"
        )

    def num_allowed(self, tokens: Sequence[int]) -> int:
        """How many leading tokens may come next; behind a stop token none may."""
        for number, token in enumerate(tokens):
            mask = self.allowed_after(tuple(tokens[:number]))
            if mask is None or not mask[token]:
                return number
        return len(tokens)

    def emit(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that were emitted. Raises DeadEndError as above."""
        for token in tokens:
            self.allowed_after()
            self._state_after((token,))
            self._states, self._masks = _behind(token, self._states), _behind(token, self._masks)
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


def _behind(token: int, known: dict[tuple[int, ...], Any]) -> dict[tuple[int, ...], Any]:
    """What is known of texts that begin with a token, by what follows it."""
    return {text[1:]: value for text, value in known.items() if text[:1] == (token,)}


def masks(
    rows: Sequence[Progress | None],
    drafted: Tensor | None,
    num_positions: int,
    vocab_size: int,
    lineage: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The tokens that may stand at the last n of the positions behind 0, 1, ..., m drafted ones, bool [rows, n, vocab].

    rows: None for a row that may say anything. drafted: int64 [rows, m] with m >= n - 1, or None for m = 0; where it is
    on a device, this waits for it. lineage: of a tree, which drafted tokens stand before each position.
    The answer is on the host.
    """
    drafts = [[]] * len(rows) if drafted is None else drafted.tolist()
    allowed = torch.ones(len(rows), num_positions, vocab_size, dtype=torch.bool)
    for row, (progress, draft) in enumerate(zip(rows, drafts, strict=True)):
        if progress is None:
            continue
        for position in range(num_positions):
            before = lineage[position] if lineage else range(len(draft) - num_positions + 1 + position)
            mask = progress.allowed_after(tuple(draft[place] for place in before))
            if mask is not None:
                allowed[row, position] = mask
    return allowed


def fewest_tokens(constraint: Constraint, stop_token_ids: frozenset[int], most: int) -> int:
    """A number of tokens, the stop token included, below which no output is complete; most + 1 for any above `most`.

    It is the least that is enough if that is found by looking at few states, else a bound from below.
    """
    return least_length(constraint, stop_token_ids, most)[0]


def least_length(constraint: Constraint, stop_token_ids: frozenset[int], most: int) -> tuple[int, bool]:
    """As `fewest_tokens`, and whether an output of so many tokens is known to be complete."""
    states, num_looked_at = [constraint.start()], 0
    for length in range(1, most + 1):
        allowed = [constraint.allowed(state).nonzero().squeeze(1).tolist() for state in states]
        if not all(map(stop_token_ids.isdisjoint, allowed)):
            return length, True
        num_looked_at += sum(map(len, allowed))
        if num_looked_at > _MAX_LOOKED_AT:
            return length + 1, False
        states = [
            constraint.advance(state, token) for state, tokens in zip(states, allowed, strict=True) for token in tokens
        ]
    return most + 1, False
