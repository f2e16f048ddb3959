"""Suffix decoding: drafts copied from the request's own text and from finished requests.

The acceptance probability of a copied token is estimated from how often it followed the suffixes of the text: the more
often a suffix occurred, the more weight its frequencies have relative to those of the next shorter suffix. The reach of
a copy is the product of these probabilities, token by token.

Drafts depend only on committed tokens, so their distribution is one-hot. With a history of finished requests, drafts
also depend on other requests. This does not change the output distribution, nor greedy and coupled outputs, but it does
change the sample for a seed. An output reveals the random draws behind it, so copying it and reusing those draws would
bias the result. The engine therefore gives each request its own uniforms (`specdec.sampling.randomness.own_seed`).

Sources: Oliaro et al. 2024 (arXiv:2411.04975); smoothing with shorter contexts: MacKay and Peto 1995, "A hierarchical
Dirichlet language model".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Protocol

import torch

from specdec.kernels import suffix_tree
from specdec.kernels.suffix_tree import CompiledTree
from specdec.proposers.adaptive import AdaptiveLength, together
from specdec.proposers.base import CopyingProposer
from specdec.proposers.ngram import pad
from specdec.proposers.suffix_tree import DEPTH, NODE_BYTES, TOKEN_BYTES, Followers, Place, SuffixTree
from specdec.requests import Batch, Generation
from specdec.sampling_params import SamplingParams
from specdec.verification import Draft

MIN_REACH = 0.1  # a copy ends when the probability of its acceptance up to there falls below this
GREEDY_DOUBT, SAMPLED_DOUBT = 2.5, 5.0  # see `doubt`; fitted to texts of smollm2-135m


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens to propose. reach: for each, the estimated probability that it and all before it are accepted."""

    tokens: tuple[int, ...] = ()
    reach: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """The expected number of accepted tokens."""
        return sum(self.reach)

    def cut(self, length: int) -> Copy:
        """The first `length` tokens."""
        return Copy(self.tokens[:length], self.reach[:length])


def cut_together(copies: Sequence[Copy], num_rows: int, adaptive: AdaptiveLength) -> list[Copy]:
    """Truncate the rows' copies to the length that is worth verifying in a step of num_rows rows."""
    length, _ = adaptive.best_length(together([copy.reach for copy in copies]), num_rows)
    return [copy.cut(length) for copy in copies]


def doubt(sampling: SamplingParams) -> float:
    """Smoothing weight of the next shorter suffix, in occurrences; larger for sampling than for greedy decoding."""
    temperature = 0.0 if sampling.top_k == 1 else min(sampling.temperature, 1.0)
    return GREEDY_DOUBT + temperature * (SAMPLED_DOUBT - GREEDY_DOUBT)


def copy_from(tree: SuffixTree, places: Sequence[Place], limit: int, doubt: float) -> Copy:
    """Copy the most probable continuation from a tree, until its reach falls below MIN_REACH.

    places: of the suffixes of the text in the tree, from the empty one up.
    """
    tokens: list[int] = []
    probs: list[float] = []
    reach = 1.0
    while len(tokens) < limit:
        token, prob = _likeliest(tree, places, tokens, doubt)
        reach *= prob
        if reach < MIN_REACH:
            break
        places = tree.extended(places, token, tokens)
        tokens.append(token)
        probs.append(prob)
    return Copy(tuple(tokens), tuple(accumulate(probs, mul)))


def _likeliest(tree: SuffixTree, places: Sequence[Place], drafted: Sequence[int], doubt: float) -> tuple[int, float]:
    """(token, probability): the most probable of each suffix's most frequent next tokens; ties go to the longer suffix.

    The probability is 0 without a match.
    """
    followers, tokens = tree.followers(places[1:], drafted)  # the empty context is not used
    best, most_probable = 0, 0.0
    for token in dict.fromkeys(reversed(tokens)):
        if token is not None and (prob := _probability(followers, token, doubt)) > most_probable:
            best, most_probable = token, prob
    return best, most_probable


def _probability(followers: Sequence[Followers], token: int, doubt: float) -> float:
    prob = 0.0
    for children, total in followers:
        child = children.get(token)
        times = 0 if child is None else 1 if isinstance(child, int) else child.count
        prob = (times + doubt * prob) / (total + doubt)
    return prob


class TextTree(Protocol):
    """A suffix tree of texts that copies from it."""

    @property
    def depth(self) -> int:
        """Maximum length of counted runs."""
        ...

    @property
    def num_bytes(self) -> int:
        """Upper bound on the memory of the tree."""
        ...

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the growing text."""
        ...

    def complete(self) -> None:
        """Complete the growing text and start the next."""
        ...

    def forget_oldest(self) -> None:
        """Drop the oldest complete text; no text may be growing."""
        ...

    def copied(self, after: Sequence[int] | None, limit: int, doubt: float) -> Copy:
        """`copy_from` of the growing text, or of other tokens, of which the last `depth` - 1 count."""
        ...


class PlainTree(SuffixTree):
    """The tree in Python, for machines without a C++ compiler."""

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.append(token)

    def copied(self, after: Sequence[int] | None, limit: int, doubt: float) -> Copy:
        return copy_from(self, self.ends() if after is None else self.find(after), limit, doubt)


class FastTree(CompiledTree):
    """The same in C++, with the same results; its size is computed as that of the tree in Python."""

    @property
    def num_bytes(self) -> int:
        return NODE_BYTES * self.num_nodes + TOKEN_BYTES * self.num_tokens

    def copied(self, after: Sequence[int] | None, limit: int, doubt: float) -> Copy:
        context = None if after is None else after[-self.depth + 1 :]
        tokens, reach = self.copy(context, limit, doubt, MIN_REACH)
        return Copy(tuple(tokens), tuple(reach))


def new_tree(depth: int = DEPTH) -> TextTree:
    """An empty tree: in C++ if this machine can compile it."""
    return FastTree(depth) if suffix_tree.available() else PlainTree(depth)


class History:
    """The text of finished requests in a tree of bounded size; the oldest texts are dropped first.

    max_bytes: maximum memory; 0 disables it.
    """

    def __init__(self, max_bytes: int, new_tree: Callable[[], TextTree] = new_tree) -> None:
        self.max_bytes, self._new_tree = max_bytes, new_tree
        self.tree = new_tree()

    def add(self, tokens: Sequence[int]) -> None:
        """Add a text, truncated to its end if it is larger than the maximum memory."""
        room = self.max_bytes // TOKEN_BYTES - 1  # minus the separator
        if room <= 0:
            return
        self.tree.extend(tokens[-room:])
        self.tree.complete()
        while self.tree.num_bytes > self.max_bytes:
            self.tree.forget_oldest()

    def forget(self) -> None:
        """Drop all texts."""
        self.tree = self._new_tree()


class OwnText:
    """The tree of a request's own text."""

    def __init__(self) -> None:
        self._tree, self._num_added = new_tree(), 0

    def copy(self, tokens: Sequence[int], limit: int, doubt: float) -> Copy:
        """Copy a continuation of `tokens`, which are those of the last call with more appended."""
        self._tree.extend(tokens[self._num_added :])
        self._num_added = len(tokens)
        return self._tree.copied(None, limit, doubt)


class SuffixProposer(CopyingProposer):
    """Proposes the better of two copies: from the request's own text, and from finished requests.

    max_history_bytes: see `History`. adaptive: limits the length by measured costs; None limits it only by MIN_REACH.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        max_history_bytes: int = 0,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        self._vocab_size, self._device, self._adaptive = vocab_size, device, adaptive
        self.history = History(max_history_bytes)
        self._own: dict[Generation, OwnText] = {}

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        guesses = self.guess(batch, limits)
        width = batch.width(max(map(len, guesses)))
        return Draft.deterministic(*pad(guesses, self._device, width), self._vocab_size)

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The best copy for each row, cut to the length that is worth verifying."""
        copies = self.copies(batch, limits)
        if self._adaptive:
            copies = cut_together(copies, sum(row is not None for row in batch.rows), self._adaptive)
        return [list(copy.tokens) for copy in copies]

    def copies(self, batch: Batch, limits: Sequence[int]) -> list[Copy]:
        """The best copy for each row, up to the first token that a constraint forbids; empty without a match."""
        self._settle(batch.rows)
        copies = [self._copy(row, limit) if row else Copy() for row, limit in zip(batch.rows, limits, strict=True)]
        return [copy.cut(batch.sampling.num_allowed(index, copy.tokens)) for index, copy in enumerate(copies)]

    def forget(self) -> None:
        """Drop the text of finished requests."""
        self.history.forget()
        self._own.clear()

    def _settle(self, rows: Sequence[Generation | None]) -> None:
        """Add the requests that have finished since the last call to the history, in order of arrival."""
        in_flight = {row for row in rows if row is not None}
        for row in [row for row in self._own if row not in in_flight]:
            del self._own[row]
            if row.finish_reason:  # include the end of the prompt, as context of the output
                start = len(row.request.prompt) - self.history.tree.depth + 1
                self.history.add(row.tokens[max(0, start) :])
        self._own |= {row: OwnText() for row in rows if row is not None and row not in self._own}

    def _copy(self, row: Generation, limit: int) -> Copy:
        smoothing, tree = doubt(row.request.sampling), self.history.tree
        own = self._own[row].copy(row.tokens, limit, smoothing)
        others = tree.copied(row.tokens[-tree.depth :], limit, smoothing) if self.history.max_bytes else Copy()
        return max(own, others, key=lambda copy: copy.score)
