"""Suffix decoding: drafts copied from the request's own text and from finished requests, while they pay.

How likely the next token of a copy is accepted is estimated from how often it followed the runs of tokens that end the
text: the more often a run occurred, the more weight its frequencies have against those of the next shorter run. The
score of a copy is the product of these, token by token.

What is proposed depends on committed tokens, so its distribution is one-hot. Where finished requests are remembered,
it depends on other requests, too: the distribution of what is emitted does not, nor do greedy and coupled outputs, but
which sample a seed gives does. An output reveals the uniforms behind it; a request that drew by them again would be
biased. So the engine gives each request uniforms of its own (`specdec.sampling.randomness.own_seed`).

Sources: Oliaro et al. 2024 (arXiv:2411.04975); smoothing towards the shorter run: MacKay and Peto 1995, "A hierarchical
Dirichlet language model".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch

from specdec.proposers.adaptive import AdaptiveLength, together
from specdec.proposers.base import Proposer
from specdec.proposers.ngram import pad
from specdec.proposers.suffix_tree import TOKEN_BYTES, Place, SuffixTree
from specdec.requests import Batch, Generation
from specdec.sampling_params import SamplingParams
from specdec.verification import Draft

MIN_REACH = 0.1  # a copy ends where it is less likely than this that verification comes so far
GREEDY_DOUBT, SAMPLED_DOUBT = 2.5, 5.0  # see `doubt`; fitted to texts of smollm2-135m


@dataclass(frozen=True, slots=True)
class Copy:
    """Tokens to propose, and for each the probability that it and those before it are accepted, estimated."""

    tokens: tuple[int, ...] = ()
    reach: tuple[float, ...] = ()

    @property
    def score(self) -> float:
        """Tokens that are accepted, expected."""
        return sum(self.reach)

    def cut(self, length: int) -> Copy:
        """Its first tokens."""
        return Copy(self.tokens[:length], self.reach[:length])


def cut_together(copies: Sequence[Copy], num_rows: int, adaptive: AdaptiveLength) -> list[Copy]:
    """As much of the rows' copies as pays, in a step that so many rows share."""
    length, _ = adaptive.best_length(together([copy.reach for copy in copies]), num_rows)
    return [copy.cut(length) for copy in copies]


def doubt(sampling: SamplingParams) -> float:
    """Occurrences of a run that its shorter one's frequencies weigh as much as: more where tokens are drawn."""
    temperature = 0.0 if sampling.top_k == 1 else min(sampling.temperature, 1.0)
    return GREEDY_DOUBT + temperature * (SAMPLED_DOUBT - GREEDY_DOUBT)


def copy_from(tree: SuffixTree, places: Sequence[Place], limit: int, doubt: float) -> Copy:
    """What a tree says that follows: at each place the likeliest token, while verification may come so far.

    places: of the runs that end here, from the empty one up.
    """
    tokens: list[int] = []
    probs: list[float] = []
    reach = 1.0
    while len(tokens) < limit:
        token, prob = _likeliest(tree, places, tokens, doubt)
        reach *= prob
        if reach < MIN_REACH:
            break
        places = tree.behind(places, token, tokens)
        tokens.append(token)
        probs.append(prob)
    return Copy(tuple(tokens), tuple(accumulate(probs, mul)))


def _likeliest(tree: SuffixTree, places: Sequence[Place], drafted: Sequence[int], doubt: float) -> tuple[int, float]:
    """Of the tokens that followed one of the runs most often the likeliest, a longer run's among equals.

    The probability is 0 where nothing is known.
    """
    candidates = {tree.likeliest(place, drafted): None for place in reversed(places[1:])}
    scored = ((token, _probability(tree, places, token, drafted, doubt)) for token in candidates if token is not None)
    return max(scored, key=lambda each: each[1], default=(0, 0.0))


def _probability(tree: SuffixTree, places: Sequence[Place], token: int, drafted: Sequence[int], doubt: float) -> float:
    prob = 0.0
    for place in places[1:]:  # one token says something of the next, none does not
        times, total = tree.times(place, token, drafted)
        prob = (times + doubt * prob) / (total + doubt)
    return prob


class History:
    """The text of finished requests in one tree of a bounded size; the oldest is dropped first.

    max_bytes: maximum of its memory; 0 for none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.tree = SuffixTree()

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a text, of which no more is kept than there is room for."""
        room = self.max_bytes // TOKEN_BYTES - 1  # a separator goes with it
        if room <= 0:
            return
        for token in tokens[-room:]:
            self.tree.append(token)
        self.tree.complete()
        while self.tree.num_bytes > self.max_bytes:
            self.tree.forget_oldest()

    def forget(self) -> None:
        """Forget all."""
        self.tree = SuffixTree()


class OwnText:
    """The tree of a request's own text."""

    def __init__(self) -> None:
        self._tree, self._num_known = SuffixTree(), 0

    def copy(self, tokens: Sequence[int], limit: int, doubt: float) -> Copy:
        """What follows; `tokens` are those of the last call with more appended."""
        for token in tokens[self._num_known :]:
            self._tree.append(token)
        self._num_known = len(tokens)
        return copy_from(self._tree, self._tree.ends(), limit, doubt)


class SuffixProposer(Proposer):
    """Proposes the better copy of two: from the request's own text, and from finished requests.

    max_history_bytes: see `History`. adaptive: settles how much of a copy pays by measured costs; None for all of it
    that may well be reached.
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
        copies = self.copies(batch, limits)
        if self._adaptive:
            copies = cut_together(copies, sum(row is not None for row in batch.rows), self._adaptive)
        guesses = [copy.tokens for copy in copies]
        width = batch.width(max(map(len, guesses)))
        return Draft.deterministic(*pad(guesses, self._device, width), self._vocab_size)

    def copies(self, batch: Batch, limits: Sequence[int]) -> list[Copy]:
        """The best copy for each row, none where nothing is known; up to where a constraint forbids it."""
        self._settle(batch.rows)
        copies = [self._copy(row, limit) if row else Copy() for row, limit in zip(batch.rows, limits, strict=True)]
        return [copy.cut(batch.sampling.num_allowed(index, copy.tokens)) for index, copy in enumerate(copies)]

    def forget(self) -> None:
        """Drop the text of finished requests."""
        self.history.forget()
        self._own.clear()

    def _settle(self, rows: Sequence[Generation | None]) -> None:
        """Remember the requests that have finished since, in the order in which they came."""
        in_flight = {row for row in rows if row is not None}
        for row in [row for row in self._own if row not in in_flight]:
            del self._own[row]
            if row.finish_reason:  # and as much of the prompt as can be context of the output
                start = len(row.request.prompt) - self.history.tree.depth + 1
                self.history.add(row.tokens[max(0, start) :])
        self._own |= {row: OwnText() for row in rows if row is not None and row not in self._own}

    def _copy(self, row: Generation, limit: int) -> Copy:
        sure, tree = doubt(row.request.sampling), self.history.tree
        own = self._own[row].copy(row.tokens, limit, sure)
        others = copy_from(tree, tree.find(row.tokens[-tree.depth :]), limit, sure)
        return max(own, others, key=lambda copy: copy.score)
