"""A suffix tree of texts with counts: how often each short run of tokens occurred, and which tokens followed it.

The tree has a node for each run of up to `depth` tokens that occurred at least twice. A run that occurred once is a
leaf with the position of its end, from which the text itself continues. So the tree is a function of its texts alone,
and dropping the oldest text is exact: the result is the tree of the other texts.

Appending a token updates the runs that end with it and occurred before: at most `depth`, however long the text is.
Source: Oliaro et al. 2024, SuffixDecoding (arXiv:2411.04975), which also limits the depth.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

DEPTH = 16  # maximum length of a run: 15 tokens of context and the next token
SEPARATOR = -1  # terminates each complete text; no run extends across it
# upper bounds on 64-bit CPython, including dictionary entries and one dropped token per kept one
NODE_BYTES, TOKEN_BYTES = 360, 160


@dataclass(slots=True, eq=False)
class Node:
    """A run of tokens that occurred at least twice.

    count: number of occurrences. total: occurrences followed by a token. last: position of the end of the latest one.
    children: next token -> longer run, or the position of the end of its only occurrence.
    likeliest: the most frequent next token, ties to the latest occurrence; None if it must be recomputed.
    """

    count: int = 0
    total: int = 0
    last: int = -1
    likeliest: int | None = None
    children: dict[int, Place] = field(default_factory=dict)


Place = Node | int  # a run in the tree: its node, or for a single occurrence the position of its end


Followers = tuple[dict[int, Place], int]  # longer runs by their last token, and the number of their occurrences
_NOTHING: Followers = ({}, 0)


class SuffixTree:
    """A tree that grows token by token; complete texts can be dropped, oldest first.

    depth: maximum length of counted runs, at least 2.
    """

    def __init__(self, depth: int = DEPTH) -> None:
        if depth < 2:
            raise ValueError(f"depth={depth} must be at least 2, for one token of context and the next token")
        self.depth = depth
        self._root = Node()
        self._open = [self._root]  # suffixes of the text that occurred before, from the empty one up
        self._text: list[int] = []
        self._start = 0  # position of the first token in _text
        self._num_forgotten = 0  # leading tokens of _text that are no longer counted
        self._begin = 0  # position of the start of the growing text
        self._lengths: deque[int] = deque()  # of complete texts, including separators
        self._num_nodes = 0

    @property
    def num_bytes(self) -> int:
        """Upper bound on the memory of the tree."""
        return NODE_BYTES * self._num_nodes + TOKEN_BYTES * (len(self._text) - self._num_forgotten)

    def append(self, token: int) -> None:
        """Append a token to the growing text."""
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
        """Create the node of a run at its second occurrence, with the token after the first occurrence as a child."""
        self._num_nodes += 1
        node = Node(count=2, last=position)
        next_token = self._text[first + 1 - self._start]
        if length < self.depth and next_token != SEPARATOR:
            node.children[next_token] = first + 1
            node.total, node.likeliest = 1, next_token
        return node

    def complete(self) -> None:
        """Complete the growing text and start the next."""
        self._text.append(SEPARATOR)
        self._open = [self._root]
        end = self._start + len(self._text)
        self._lengths.append(end - self._begin)
        self._begin = end

    def forget_oldest(self) -> None:
        """Drop the oldest complete text; no text may be growing."""
        length = self._lengths.popleft()
        first = self._start + self._num_forgotten
        for position in range(first, first + length - 1):
            self._uncount(position)
        self._num_forgotten += length
        if 2 * self._num_forgotten >= len(self._text):  # amortizes the cost of shifting the list
            del self._text[: self._num_forgotten]
            self._start, self._num_forgotten = self._start + self._num_forgotten, 0

    def _uncount(self, position: int) -> None:
        """Uncount the runs that start at a position, which is the earliest occurrence of each."""
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
            if child.count == 1:  # the remaining occurrence is the latest
                node.children[token] = child.last
                self._num_nodes -= _chain_length(child)
                return
            node = child

    def ends(self) -> list[Place]:
        """The suffixes of the growing text that occurred before, from the empty one up."""
        return list(self._open)

    def find(self, tokens: Sequence[int]) -> list[Place]:
        """The suffixes of other tokens that occur in the tree, as `ends`."""
        places: list[Place] = [self._root]
        for token in tokens[-self.depth + 1 :]:
            places = self.extended(places, token, ())
        return places

    def extended(self, places: Sequence[Place], token: int, drafted: Sequence[int]) -> list[Place]:
        """The suffixes after one more token, from those before it.

        drafted: tokens assumed to follow the growing text.
        """
        longer: list[Place] = [self._root]
        last, next_token = None, None  # most single occurrences are at the same position
        for place in places[: self.depth - 1]:
            if isinstance(place, Node):
                child = place.children.get(token)
                if child is not None:
                    longer.append(child)
                continue
            if place != last:
                last, next_token = place, self._token_at(place + 1, drafted)
            if next_token == token:
                longer.append(place + 1)
        return longer

    def followers(self, places: Sequence[Place], drafted: Sequence[int]) -> tuple[list[Followers], list[int | None]]:
        """What followed each of the runs, and the most frequent token after each, None if no token followed it."""
        found: list[Followers] = []
        tokens: list[int | None] = []
        last, single, token = None, _NOTHING, None  # most single occurrences are at the same position
        for place in places:
            if isinstance(place, Node):
                likeliest = place.likeliest
                tokens.append(self.likeliest(place, drafted) if likeliest is None else likeliest)
                found.append((place.children, place.total))
                continue
            if place != last:
                last, token = place, self._token_at(place + 1, drafted)
                single = _NOTHING if token is None else ({token: place + 1}, 1)
            tokens.append(token)
            found.append(single)
        return found, tokens

    def likeliest(self, place: Place, drafted: Sequence[int]) -> int | None:
        """The most frequent token after a run; None if no token followed it."""
        if not isinstance(place, Node):
            return self._token_at(place + 1, drafted)
        if place.likeliest is None and place.total:
            place.likeliest = max(place.children, key=lambda token: _count_and_last(place.children[token]))
        return place.likeliest

    def _token_at(self, position: int, drafted: Sequence[int]) -> int | None:
        """The token at a position, which may be in the draft: so a repeating text is continued beyond its end."""
        index = position - self._start
        token = self._text[index] if index < len(self._text) else drafted[index - len(self._text)]
        return token if token != SEPARATOR else None


def _count(node: Node, token: int) -> int:
    """The number of times that a token followed a run."""
    child = node.children.get(token)
    return child.count if isinstance(child, Node) else int(child is not None)


def _count_and_last(place: Place) -> tuple[int, int]:
    return (place.count, place.last) if isinstance(place, Node) else (1, place)


def _chain_length(node: Node) -> int:
    """The number of nodes from one with two occurrences downward, a chain: each has two occurrences and one child."""
    length, place = 1, node
    while (child := next((child for child in place.children.values() if isinstance(child, Node)), None)) is not None:
        length, place = length + 1, child
    return length
