"""The n-gram table against counting by hand, and what it is stored as."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.proposers.table import NgramTable
from specdec.runtime.artifacts import LoadError

texts = st.lists(st.lists(st.integers(0, 3), max_size=20), min_size=1, max_size=5).filter(lambda t: any(map(len, t)))


def by_hand(texts: list[list[int]], context: list[int], min_count: int) -> int | None:
    """The commonest token after a context, the lowest among equals, if it is common enough."""
    n = len(context)
    following = Counter(t[i + n] for t in texts for i in range(len(t) - n) if t[i : i + n] == context)
    if not following:
        return None
    token, count = min(following.items(), key=lambda item: (-item[1], item[0]))
    return token if count >= min_count else None


@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 3))
def test_the_longest_known_context_proposes(texts: list[list[int]], text: list[int], min_count: int) -> None:
    table = NgramTable.count(texts, 4, max_ngram=3, min_count=min_count)
    sizes = range(min(3, len(text)), 0, -1)
    expected = next((t for n in sizes if (t := by_hand(texts, text[-n:], min_count)) is not None), None)
    assert table.continuation(text, 1) == ([] if expected is None else [expected])


def test_a_draft_continues_from_its_own_tokens_and_ends_at_an_unknown_context() -> None:
    table = NgramTable.count([[5, 6, 7, 8], [5, 6, 7, 8]], 10, max_ngram=2)
    assert table.continuation([1, 5], 9) == [6, 7, 8]
    assert table.continuation([5], 2) == [6, 7]
    assert table.continuation([9], 2) == []


def test_the_largest_token_ids_are_kept_apart() -> None:
    """Four tokens of 16 bits fill the 64 bits of a context."""
    texts = [[65535, 65535, 65535, 65535, 1], [65535, 65535, 65535, 0, 2]] * 2
    table = NgramTable.count(texts, 65536, max_ngram=4)
    assert table.continuation([65535] * 4, 1) == [1]
    assert table.continuation([65535, 65535, 65535, 0], 1) == [2]
    with pytest.raises(ValueError, match="max_ngram=4 must be from 1 to 3 with 65537 tokens"):
        NgramTable.count(texts, 65537, max_ngram=4)


def test_saving_and_loading_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    NgramTable.count([[1, 2, 3, 1, 2, 3]], 7, max_ngram=3).save(path)
    loaded = NgramTable.load(path)
    assert loaded.vocab_size == 7
    assert loaded.continuation([1], 4) == [2, 3]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LoadError, match="must be an undamaged n-gram table"):
        NgramTable.load(path)
