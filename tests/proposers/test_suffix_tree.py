"""The suffix tree against counting by hand, its memory, and what a token costs, counted."""

from __future__ import annotations

import tracemalloc
from collections import Counter

import pytest
import torch
from helpers.suffixes import spelt_out
from hypothesis import given
from hypothesis import strategies as st

from specdec.proposers.suffix_tree import Node, Place, SuffixTree

texts = st.lists(st.lists(st.integers(0, 2), max_size=14), max_size=6)


def grow(texts: list[list[int]], depth: int, growing: list[int] = ()) -> SuffixTree:
    """A tree of complete texts, and of one that grows."""
    tree = SuffixTree(depth)
    for text in texts:
        for token in text:
            tree.append(token)
        tree.complete()
    for token in growing:
        tree.append(token)
    return tree


def occurrences(texts: list[list[int]], run: tuple[int, ...]) -> list[tuple[int, int]]:
    """(text, end) of each, from the earliest to the latest."""
    size = len(run)
    return [
        (i, j + size) for i, t in enumerate(texts) for j in range(len(t) - size + 1) if tuple(t[j : j + size]) == run
    ]


def followers(texts: list[list[int]], run: tuple[int, ...]) -> list[int]:
    return [texts[i][end] for i, end in occurrences(texts, run) if end < len(texts[i])]


def likeliest(texts: list[list[int]], run: tuple[int, ...]) -> int | None:
    """The commonest follower; the one seen last among equals."""
    found = followers(texts, run)
    counts = Counter(found)
    return max(found, key=lambda t: (counts[t], len(found) - found[::-1].index(t)), default=None)


def all_runs(texts: list[list[int]], depth: int) -> set[tuple[int, ...]]:
    return {tuple(t[i : i + n]) for t in texts for n in range(depth + 1) for i in range(len(t) - n + 1)}


@given(texts, st.lists(st.integers(0, 2), max_size=14), st.integers(2, 5))
def test_counts_are_those_by_hand(texts: list[list[int]], growing: list[int], depth: int) -> None:
    tree, everything = grow(texts, depth, growing), [*texts, growing]
    for run in all_runs(everything, depth - 1) - {()}:
        place = tree.find(run)[-1]
        expected = Counter(followers(everything, run))
        if len(occurrences(everything, run)) == 1 and not expected and run == tuple(growing[-len(run) :]):
            continue  # the end of the growing text itself: nothing is known after it
        [(children, total)], tokens = tree.followers([place], ())
        assert {token: getattr(child, "count", 1) for token, child in children.items()} == expected
        assert total == expected.total()
        assert tokens == [tree.likeliest(place, ())] == [likeliest(everything, run)]


@given(texts, st.lists(st.integers(0, 2), min_size=1, max_size=14), st.integers(2, 5))
def test_places_are_those_of_all_known_ends(texts: list[list[int]], other: list[int], depth: int) -> None:
    """Found by walking down with other tokens, and kept while the text itself grows."""
    found = len(grow(texts, depth).find(other)) - 1
    ends = [tuple(other[len(other) - n :]) for n in range(1, min(depth - 1, len(other)) + 1)]
    assert found == max((len(end) for end in ends if occurrences(texts, end)), default=0)
    growing = grow(texts, depth, other)
    repeated = max((len(end) for end in ends if len(occurrences([*texts, other], end)) > 1), default=0)
    assert len(growing.ends()) - 1 == repeated
    assert growing.ends() == growing.find(other)[: repeated + 1]


@given(texts, st.integers(0, 6), st.integers(2, 5))
def test_forgetting_the_oldest_is_exact(texts: list[list[int]], number: int, depth: int) -> None:
    """What is left is the tree of the other texts: every count, every leaf, every commonest token."""
    tree, number = grow(texts, depth), min(number, len(texts))
    for _ in range(number):
        tree.forget_oldest()
    fresh = grow(texts[number:], depth)
    assert spelt_out(tree) == spelt_out(fresh)
    assert tree._num_nodes == fresh._num_nodes == len([run for run, facts in spelt_out(tree).items() if len(facts) > 2])
    assert len(tree._text) <= 2 * len(fresh._text)


@given(texts, texts, st.integers(2, 5))
def test_texts_added_after_forgetting_are_counted_equally(first: list, then: list, depth: int) -> None:
    tree = grow(first, depth)
    for _ in first[1:]:
        tree.forget_oldest()
    for text in then:
        for token in text:
            tree.append(token)
        tree.complete()
    assert spelt_out(tree) == spelt_out(grow([*first[-1:], *then], depth))


def obvious_continuation(text: list[int], run: int, number: int) -> list[int]:
    """Copy what follows the latest earlier occurrence of the last `run` tokens, on into the copy itself."""
    (_, end) = occurrences([text[:-1]], tuple(text[-run:]))[-1]
    longer = list(text)
    for i in range(number):
        longer.append(longer[end + i])
    return longer[len(text) :]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 20))
def test_a_run_that_reaches_the_end_continues_in_the_draft(period: list[int], number: int) -> None:
    text, drafted = period * 2, []
    tree = grow([], len(text), text)
    places = tree.ends()
    for _ in range(number):
        token = tree.likeliest(places[-1], drafted)
        places = tree.extended(places, token, drafted)
        drafted.append(token)
    assert drafted == obvious_continuation(text, len(period), number)


def test_a_depth_without_context_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=1 must be at least 2, for one token of context"):
        SuffixTree(1)


# -- costs, counted and not timed ----------------------------------------------------------------------------


class Counted(dict[int, Place]):
    """Children that count how often they are looked at; to go through all of them counts each."""

    looked_at = 0

    def get(self, *key):
        Counted.looked_at += 1
        return super().get(*key)

    def __getitem__(self, key):
        Counted.looked_at += 1
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        Counted.looked_at += 1
        super().__setitem__(key, value)

    def __delitem__(self, key):
        Counted.looked_at += 1
        super().__delitem__(key)

    def __iter__(self):
        Counted.looked_at += len(self)
        return super().__iter__()


class CountedNode(Node):
    __slots__ = ()

    def __init__(self, **facts):
        super().__init__(**facts)
        self.children = Counted()


def words(num_tokens: int, seed: int = 0) -> list[int]:
    """Tokens whose frequencies fall with their rank as those of words do."""
    weights = 1 / torch.arange(1, 2001, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights, num_tokens, replacement=True, generator=generator).tolist()


def ask(tree: SuffixTree, number: int) -> None:
    """How the text continues, by the longest runs."""
    places, drafted = tree.ends(), []
    while len(drafted) < number and (token := tree.likeliest(places[-1], drafted)) is not None:
        places = tree.extended(places, token, drafted)
        drafted.append(token)


def looks_per_token(tokens: list[int], piece: int) -> list[float]:
    """Looks at children for each token, by thousands: tokens are appended in texts of some length, of which ten are
    kept, and before each a draft of four tokens is asked for.
    """
    tree, looks = SuffixTree(), []
    for start in range(0, len(tokens), 1000):
        Counted.looked_at = 0
        for begin in range(start, start + 1000, piece):
            for token in tokens[begin : begin + piece]:
                ask(tree, 4)
                tree.append(token)
            tree.complete()
            if len(tree._lengths) > 10:
                tree.forget_oldest()
        looks.append(Counted.looked_at / 1000)
    return looks


@pytest.mark.parametrize("piece", [100, 500])
def test_the_cost_per_token_does_not_grow_with_the_text(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks are counted, not time: to append, to ask and to forget, in a text whose tokens are as unlike as words."""
    monkeypatch.setattr("specdec.proposers.suffix_tree.Node", CountedNode)
    looks = looks_per_token(words(20_000), piece)
    assert max(looks[10:]) < 1.2 * max(looks[5:10])
    assert max(looks) < 60


def test_a_text_that_repeats_itself_costs_as_much_as_the_depth_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specdec.proposers.suffix_tree.Node", CountedNode)
    tree = SuffixTree(16)
    for token in [1, 2, 3] * 2000:
        Counted.looked_at = 0
        tree.append(token)
        assert Counted.looked_at <= 16 * 4  # find the child, write it, compare its count with that of the likeliest


@pytest.mark.parametrize(
    "tokens", [words(10_000), 2 * words(2000), [7] * 10_000], ids=["words", "said twice", "all alike"]
)
def test_num_bytes_bounds_the_memory(tokens: list[int]) -> None:
    """As allocated: at most the reported size, and at least a fifth of it, also after a part was dropped."""
    tracemalloc.start()
    tree = SuffixTree()
    for start in range(0, len(tokens), 500):
        for token in tokens[start : start + 500]:
            tree.append(token + 1000)  # no small number, which Python keeps once
        tree.complete()
    for _ in range(len(tree._lengths) // 2 - 1):
        tree.forget_oldest()
    allocated = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert tree._num_forgotten > 0.3 * len(tree._text)
    assert tree.num_bytes / 5 < allocated < tree.num_bytes
