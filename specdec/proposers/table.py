"""An n-gram table: the most frequent next token by context, counted once from a model's own text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from specdec.proposers.ngram import TokenIndex
from specdec.runtime.artifacts import explained

Array = npt.NDArray[Any]


class NgramTable:
    """Continuations by context; the longest matching context is used.

    contexts: for each context length n, from 1 up, sorted contexts, uint64 [entries], with the bits of their tokens
    concatenated. tokens: the next token of each, int32 [entries]. vocab_size: of the model.
    Raises ValueError for inconsistent arrays: wrong order, lengths or token ids.
    """

    def __init__(self, contexts: Sequence[Array], tokens: Sequence[Array], vocab_size: int) -> None:
        self._contexts, self._tokens, self.vocab_size = list(contexts), list(tokens), vocab_size
        self._bits = _bits(vocab_size)
        self._check()

    def _check(self) -> None:
        if len(self._contexts) != len(self._tokens) or not 1 <= len(self._contexts) <= 64 // self._bits:
            raise ValueError(f"an n-gram table must have contexts of 1 to {64 // self._bits} tokens; count it again")
        for size, (contexts, tokens) in enumerate(zip(self._contexts, self._tokens, strict=True), 1):
            if contexts.ndim != 1 or contexts.shape != tokens.shape or contexts.dtype != np.uint64:
                raise ValueError(f"contexts.{size} must be uint64, with a token for each; count the table again")
            if (contexts[1:] <= contexts[:-1]).any():
                raise ValueError(f"contexts.{size} must ascend, each once; count the table again")
            if any((part >= self.vocab_size).any() for part in self._split(contexts, size)):
                raise ValueError(f"contexts.{size} must be of tokens in [0, {self.vocab_size}); count the table again")
            if not np.issubdtype(tokens.dtype, np.integer) or ((tokens < 0) | (tokens >= self.vocab_size)).any():
                raise ValueError(f"tokens.{size} must lie in [0, {self.vocab_size}); count the table again")

    def _split(self, contexts: Array, size: int) -> list[Array]:
        """The tokens of contexts of `size` tokens, last one first; the final entry includes all higher bits."""
        shifted = [contexts >> np.uint64(self._bits * place) for place in range(size)]
        return [*(codes & np.uint64((1 << self._bits) - 1) for codes in shifted[:-1]), shifted[-1]]

    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` tokens; ends at an unknown context."""
        text = tokens[-len(self._contexts) :]
        num_given = len(text)
        while len(text) - num_given < limit:
            token = self._next(text)
            if token is None:
                break
            text.append(token)
        return text[num_given:]

    def _next(self, text: list[int]) -> int | None:
        for size in range(min(len(self._contexts), len(text)), 0, -1):
            code = 0
            for token in text[-size:]:
                code = code << self._bits | token
            contexts = self._contexts[size - 1]
            place = int(contexts.searchsorted(np.uint64(code)))
            if place < len(contexts) and contexts[place] == code:
                return int(self._tokens[size - 1][place])
        return None

    @classmethod
    def count(
        cls, texts: Iterable[Sequence[int]], vocab_size: int, *, max_ngram: int = 4, min_count: int = 2
    ) -> NgramTable:
        """Count texts. A context is kept if its most frequent next token occurred at least min_count times.

        Raises ValueError if max_ngram tokens of this vocabulary do not fit into 64 bits.
        """
        bits = _bits(vocab_size)
        if not 1 <= max_ngram <= 64 // bits:
            raise ValueError(f"max_ngram={max_ngram} must be from 1 to {64 // bits} with {vocab_size} tokens")
        arrays = [np.asarray(text, dtype=np.uint64) for text in texts]
        contexts, tokens = zip(*(_commonest(arrays, n, bits, min_count) for n in range(1, max_ngram + 1)), strict=True)
        return cls(contexts, tokens, vocab_size)

    def save(self, path: Path) -> None:
        """Write a safetensors file that `load` reads."""
        arrays = {f"contexts.{n}": array for n, array in enumerate(self._contexts, 1)}
        arrays |= {f"tokens.{n}": array for n, array in enumerate(self._tokens, 1)}
        save_file(arrays, path, {"vocab_size": str(self.vocab_size)})

    @classmethod
    def load(cls, path: Path) -> NgramTable:
        """Raises LoadError for a missing or damaged file."""
        rule = f"table={str(path)!r} must be an undamaged n-gram table"
        with explained(rule, "count or copy it again"), safe_open(path, "numpy") as file:
            sizes = range(1, (len(file.keys()) + 1) // 2 + 1)  # rounded up, so that a missing array is an error
            contexts = [file.get_tensor(f"contexts.{n}") for n in sizes]
            tokens = [file.get_tensor(f"tokens.{n}") for n in sizes]
            return cls(contexts, tokens, _vocab_size(file.metadata()))


def _vocab_size(metadata: dict[str, str] | None) -> int:
    size = int((metadata or {}).get("vocab_size", "0"))
    if not 1 <= size < 1 << 32:
        raise ValueError(f"vocab_size={size} of the table must be a number of tokens")
    return size


class Fallback:
    """Uses one index, and another if the first has no continuation."""

    def __init__(self, first: TokenIndex, second: TokenIndex) -> None:
        self._first, self._second = first, second

    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        return self._first.continuation(tokens, limit) or self._second.continuation(tokens, limit)


def _bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _commonest(texts: Sequence[Array], n: int, bits: int, min_count: int) -> tuple[Array, Array]:
    """The sorted contexts of n tokens, and the most frequent next token of each; ties go to the lower id."""
    codes, following = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for text in texts:
        if len(text) > n:
            code = np.zeros(len(text) - n, dtype=np.uint64)
            for offset in range(n):
                code = code << np.uint64(bits) | text[offset : offset + len(code)]
            codes.append(code)
            following.append(text[n:])
    context, token = np.concatenate(codes), np.concatenate(following)
    order = np.lexsort((token, context))
    context, token = context[order], token[order]
    starts = np.flatnonzero(_changes(context) | _changes(token))
    counts = np.diff(np.r_[starts, len(context)])
    context, token = context[starts], token[starts]
    best = np.lexsort((token, -counts, context))
    kept = best[_changes(context[best]) & (counts[best] >= min_count)]
    return context[kept], token[kept].astype(np.int32)


def _changes(values: Array) -> Array:
    """Whether each value differs from the previous one."""
    changes: Array = np.r_[True, values[1:] != values[:-1]][: len(values)]
    return changes
