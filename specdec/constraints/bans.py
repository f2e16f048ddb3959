"""Constraints other than grammars: `bad_words` and `min_tokens`.

As constraints they are exact under speculation: what is forbidden at a drafted position depends on the draft tokens
before it, for draft and target alike.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from specdec.constraints.progress import Constraint


@dataclass(frozen=True, slots=True)
class AtLeast:
    """No stop token among the first `num_tokens` tokens. A state is the number of tokens emitted."""

    num_tokens: int
    stop_token_ids: frozenset[int]
    vocab_size: int

    def __str__(self) -> str:
        return f"min_tokens={self.num_tokens}"

    def start(self) -> int:
        return 0

    def allowed(self, state: int) -> Tensor:
        mask = torch.ones(self.vocab_size, dtype=torch.bool)
        if state < self.num_tokens:
            mask[list(self.stop_token_ids)] = False
        return mask

    def advance(self, state: int, token: int) -> int | None:
        return None if token in self.stop_token_ids else state + 1


@dataclass(frozen=True, slots=True)
class Without:
    """No occurrence of certain strings, wherever token boundaries fall. A state is the last bytes of the text.

    words: the forbidden strings. pieces: the bytes of each token by id; a missing entry or a str is a special token.
    """

    words: tuple[str, ...]
    pieces: Mapping[int, Any]
    stop_token_ids: frozenset[int]
    vocab_size: int
    _never: Tensor = field(init=False, repr=False)  # tokens that contain a whole word, bool [vocab]
    _ends: tuple[tuple[bytes, Tensor], ...] = field(
        init=False, repr=False
    )  # (start of a word, tokens that complete it)

    def __post_init__(self) -> None:
        words = [word.encode() for word in self.words]
        texts = {token: piece for token, piece in self.pieces.items() if isinstance(piece, bytes)}
        never = torch.zeros(self.vocab_size, dtype=torch.bool)
        never[[token for token, piece in texts.items() if any(word in piece for word in words)]] = True
        ordered = sorted((piece, token) for token, piece in texts.items())
        ends = [
            (word[:cut], torch.tensor(_starting_with(word[cut:], ordered), dtype=torch.int64))
            for word in words
            for cut in range(1, len(word))
        ]
        object.__setattr__(self, "_never", never)
        object.__setattr__(self, "_ends", tuple(ends))

    def __str__(self) -> str:
        return f"bad_words={list(self.words)}"

    def start(self) -> bytes:
        return b""

    def allowed(self, state: bytes) -> Tensor:
        mask = ~self._never
        for start, tokens in self._ends:
            if state.endswith(start):
                mask[tokens] = False
        return mask

    def advance(self, state: bytes, token: int) -> bytes | None:
        if token in self.stop_token_ids:
            return None
        piece = self.pieces.get(token, b"")
        longest = max(len(start) for start, _ in self._ends) if self._ends else 0
        text = state + piece if isinstance(piece, bytes) else state
        return text[len(text) - longest :] if longest else b""


@dataclass(frozen=True, slots=True)
class AllOf:
    """The conjunction of several constraints. A state is the tuple of their states."""

    constraints: tuple[Constraint, ...]

    def __str__(self) -> str:
        return " with ".join(map(str, self.constraints))

    def start(self) -> tuple[Any, ...]:
        return tuple(constraint.start() for constraint in self.constraints)

    def allowed(self, state: tuple[Any, ...]) -> Tensor:
        masks = [constraint.allowed(each) for constraint, each in zip(self.constraints, state, strict=True)]
        return torch.stack(masks).all(0)

    def advance(self, state: tuple[Any, ...], token: int) -> tuple[Any, ...] | None:
        following = [constraint.advance(each, token) for constraint, each in zip(self.constraints, state, strict=True)]
        return None if any(each is None for each in following) else tuple(following)


def all_of(constraints: Sequence[Constraint]) -> Constraint | None:
    """One constraint from several; None if there are none."""
    return AllOf(tuple(constraints)) if len(constraints) > 1 else next(iter(constraints), None)


def _starting_with(text: bytes, ordered: Sequence[tuple[bytes, int]]) -> list[int]:
    """The tokens whose bytes start with a text, given sorted (bytes, token) pairs."""
    first = bisect_left(ordered, (text, -1))
    found = []
    for piece, token in ordered[first:]:
        if not piece.startswith(text):
            break
        found.append(token)
    return found
