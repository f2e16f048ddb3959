"""A suffix tree of texts, with counts: how often each short run of tokens occurred, and what followed it.

The tree has a node for each run of up to `depth` tokens that occurred at least twice. One that occurred once is not
spelt out: a leaf says where it ended, and the text itself goes on from there. So the tree of given texts is one and the
same however it came about, and forgetting the oldest text is exact: what is left is the tree of the other texts.

Appending a token touches the runs that end in it and occurred before: at most `depth`, however long the text is.
Source: Oliaro et al. 2024, SuffixDecoding (arXiv:2411.04975), whose trees are cut at a depth, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

DEPTH = 16  # tokens of a run: 15 of context and the one behind
SEPARATOR = -1  # stands behind each text that is complete; no run reaches over it
# at the most on 64-bit CPython, with the entries of nodes and leaves, and with a forgotten token for each that is kept
NODE_BYTES, TOKEN_BYTES = 360, 160


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens that occurred at least twice.

    count: how often. total: how often with a token behind it. last: where its latest occurrence ends.
    children: by the token behind it, the longer run, or where its only occurrence ends.
    likeliest: the commonest of these tokens, among equals that of the latest occurrence; None if it is to be looked up.
    """

    count: int = 0
    total: int = 0
    last: int = -1
    likeliest: int | None = None
    children: dict[int, Place] = field(default_factory=dict)


Place = Node | int  # where a run is in the tree: at a node, or for one that occurred once where it ends in the text


class SuffixTree:
    """Grows by tokens; complete texts can be forgotten, oldest first.

    depth: tokens of the longest runs that are counted, at least 2.
    """

    def __init__(self, depth: int = DEPTH) -> None:
        if depth < 2:
            raise ValueError(f"depth={depth} must be at least 2: a token of context and the one behind it")
        self.depth = depth
        self._root = Node()
        self._open = [self._root]  # the runs that end with the text and occurred before, from the empty one up
        self._text: list[int] = []
        self._start = 0  # position of the first token that is kept
        self._num_forgotten = 0  # tokens of it that are no longer counted
        self._begin = 0  # position at which the growing text begins
        self._lengths: deque[int] = deque()  # of the complete texts, separators included
        self._num_nodes = 0

    @property
    def num_bytes(self) -> int:
        """Memory that the tree takes, at the most."""
        return NODE_BYTES * self._num_nodes + TOKEN_BYTES * (len(self._text) - self._num_forgotten)

    def append(self, token: int) -> None:
        """One more token of the text that is growing."""
        position = self._start + len(self._text)
        self._text.append(token)
        runs = [self._root]
        for length, node in enumerate(self._open, 1):
            child = node.children.get(token)
            if isinstance(child, Node):
                child.count, child.last = child.count + 1, position
            elif child is not None:
                child = node.children[token] = self._second(child, position, length)
            else:
                node.children[token] = position
            node.total += 1
            if node.total == 1 or (node.likeliest is not None and _count(node, token) >= _count(node, node.likeliest)):
                node.likeliest = token
            if isinstance(child, Node):
                runs.append(child)
        self._open = runs[: self.depth]

    def _second(self, first: int, position: int, length: int) -> Node:
        """The node of a run that occurs for the second time, with what stood behind the first occurrence."""
        self._num_nodes += 1
        node = Node(count=2, last=position)
        behind = self._text[first + 1 - self._start]
        if length < self.depth and behind != SEPARATOR:
            node.children[behind] = first + 1
            node.total, node.likeliest = 1, behind
        return node

    def complete(self) -> None:
        """The text that was growing is complete; the next begins."""
        self._text.append(SEPARATOR)
        self._open = [self._root]
        end = self._start + len(self._text)
        self._lengths.append(end - self._begin)
        self._begin = end

    def forget_oldest(self) -> None:
        """Uncount the oldest of the complete texts; none may be growing."""
        length = self._lengths.popleft()
        first = self._start + self._num_forgotten
        for position in range(first, first + length - 1):
            self._uncount(position)
        self._num_forgotten += length
        if 2 * self._num_forgotten >= len(self._text):  # to shift what is left costs as much as was added since
            del self._text[: self._num_forgotten]
            self._start, self._num_forgotten = self._start + self._num_forgotten, 0

    def _uncount(self, position: int) -> None:
        """Runs that begin at a position, where the earliest occurrence of each of them is."""
        node = self._root
        for token in self._text[position - self._start : position - self._start + self.depth]:
            if token == SEPARATOR:
                return
            child = node.children[token]
            node.total -= 1
            if node.likeliest == token:
                node.likeliest = None
            if not isinstance(child, Node):
                del node.children[token]
                return
            child.count -= 1
            if child.count == 1:  # the occurrence that is left is the latest
                node.children[token] = child.last
                self._num_nodes -= _chain_length(child)
                return
            node = child

    def ends(self) -> list[Place]:
        """Where the runs are that end with the growing text and occurred before; the empty one first, each longer."""
        return list(self._open)

    def find(self, tokens: Sequence[int]) -> list[Place]:
        """Where the runs are that end with other tokens, as `ends`."""
        places: list[Place] = [self._root]
        for token in tokens[-self.depth + 1 :]:
            places = self.behind(places, token, ())
        return places

    def behind(self, places: Sequence[Place], token: int, drafted: Sequence[int]) -> list[Place]:
        """The places of runs that are longer by a token, from those of all runs that end before it.

        drafted: tokens that are taken to stand behind the text.
        """
        longer = (self._child(place, token, drafted) for place in places[: self.depth - 1])
        return [self._root, *(place for place in longer if place is not None)]

    def _child(self, place: Place, token: int, drafted: Sequence[int]) -> Place | None:
        if isinstance(place, Node):
            return place.children.get(token)
        return place + 1 if self._token_at(place + 1, drafted) == token else None

    def likeliest(self, place: Place, drafted: Sequence[int]) -> int | None:
        """The token that followed a run most often; None if none did."""
        if not isinstance(place, Node):
            return self._token_at(place + 1, drafted)
        if place.likeliest is None and place.total:
            place.likeliest = max(place.children, key=lambda token: _count_and_last(place.children[token]))
        return place.likeliest

    def times(self, place: Place, token: int, drafted: Sequence[int]) -> tuple[int, int]:
        """How often a token followed a run, and how often any did."""
        if isinstance(place, Node):
            return _count(place, token), place.total
        behind = self._token_at(place + 1, drafted)
        return int(behind == token), int(behind is not None)

    def _token_at(self, position: int, drafted: Sequence[int]) -> int | None:
        """A run that reaches the end of the text goes on into what is drafted, as a text that repeats itself does."""
        index = position - self._start
        token = self._text[index] if index < len(self._text) else drafted[index - len(self._text)]
        return token if token != SEPARATOR else None


def _count(node: Node, token: int) -> int:
    """How often a token followed a run."""
    child = node.children.get(token)
    return child.count if isinstance(child, Node) else int(child is not None)


def _count_and_last(place: Place) -> tuple[int, int]:
    return (place.count, place.last) if isinstance(place, Node) else (1, place)


def _chain_length(node: Node) -> int:
    """Nodes below and including one of two occurrences: all of them occur twice, so none has two below."""
    length, place = 1, node
    while (below := next((child for child in place.children.values() if isinstance(child, Node)), None)) is not None:
        length, place = length + 1, below
    return length
