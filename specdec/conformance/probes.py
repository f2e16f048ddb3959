"""Compares the tokens that a proposer draws with the distributions that it declares, for all drafts on a toy.

Drafts are made in ragged batches with idle rows. The drawn token is a piecewise constant function of one uniform. A
sweep finds its jumps and bisection locates them, so the probability of each token is known to 1e-8 for any
implementation, and is compared with the declared one. The jumps are also the thresholds for an enumeration of the
decode loop (`Steps.grid`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.conformance.enumeration import Each, Grid, Tokens, pieces_between
from specdec.conformance.toys import next_distribution
from specdec.models.base import FeatureLayers
from specdec.models.markov import MarkovModel
from specdec.proposers.base import Proposer
from specdec.requests import Batch, Generation, Request
from specdec.sampling.randomness import Role, UniformSource, off_branch
from specdec.sampling.state import SamplingState
from specdec.sampling_params import SamplingParams
from specdec.verification import Draft

MakeProposer = Callable[[MarkovModel, UniformSource], Proposer]
SWEEP, BISECTIONS = 64, 23  # equally spaced uniforms, and bisections of each interval with a jump
MAX_JUMPS = 8  # maximum for a draw over three tokens; an inverse distribution function has two
TOLERANCE = 1e-6  # of probabilities, which may be float32
NOTHING = -1  # placeholder token after the end of a draft


class NotCertified(AssertionError):
    """A proposer that would make the output distribution wrong; the message names the error and its location."""


@dataclass(frozen=True, slots=True)
class Toy:
    """A small test case: a target with few tokens, a prompt, the number of tokens to emit and to propose per step."""

    name: str
    target: MarkovModel
    prompt: Tokens
    num_tokens: int
    num_speculative_tokens: int
    stop_token_ids: tuple[int, ...] = ()

    def limit(self, output: Tokens) -> int:
        """The maximum draft length after an output."""
        return max(0, min(self.num_speculative_tokens, self.num_tokens - len(output) - 1))


@dataclass(frozen=True, slots=True)
class Place:
    """The context of a draft token: the output before the draft, and the draft before the token."""

    output: Tokens
    drafted: Tokens

    def __str__(self) -> str:
        return f"draft token {len(self.drafted) + 1} after output {list(self.output)} and draft {list(self.drafted)}"


@dataclass(slots=True)
class Steps:
    """A proposer's draws on a toy by place: its declared distributions, and the jumps of its draws.

    size: number of different declared distributions.
    """

    toy: Toy
    declared: dict[Place, set[tuple[float, ...]]] = field(default_factory=lambda: defaultdict(set))
    jumps: dict[Place, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def size(self) -> int:
        return sum(map(len, self.declared.values()))

    def add(self, place: Place, probs: Sequence[float]) -> None:
        self.declared[place].add(tuple(round(prob, 9) for prob in probs))

    def grid(self, output: Tokens) -> Grid:
        """Pieces for the uniforms of the step after an output, on each of which draft and acceptance are constant."""
        places = [place for place in self.declared if place.output == output]
        count = self.toy.num_speculative_tokens
        draft: list[list[float]] = [[] for _ in range(count)]
        accept: list[list[float]] = [[] for _ in range(count)]
        last = list(itertools.accumulate(self._target(output, ())))
        for place in places:
            depth, target = len(place.drafted), self._target(output, place.drafted)
            draft[depth] += self.jumps[place]
            for probs in self.declared[place]:
                draft[depth] += itertools.accumulate(probs)
                accept[depth] += [p / q for p, q in zip(target, probs, strict=True) if q]
                last += _residual_edges(target, probs)
            for token in range(len(target)):
                last += itertools.accumulate(self._target(output, (*place.drafted, token)))
        return Each(tuple(map(pieces_between, draft))), Each(tuple(map(pieces_between, accept))), pieces_between(last)

    def _target(self, output: Tokens, drafted: Tokens) -> list[float]:
        row: list[float] = next_distribution(self.toy.target, (*self.toy.prompt, *output, *drafted)).tolist()
        return row


def _residual_edges(target: Sequence[float], draft: Sequence[float]) -> Iterable[float]:
    excess = [max(p - q, 0.0) for p, q in zip(target, draft, strict=True)]
    return itertools.accumulate(mass / (sum(excess) or 1.0) for mass in excess)


def probe(toy: Toy, make_proposer: MakeProposer, steps: Steps) -> None:
    """Find all drafts that a proposer can make on a toy. Raises NotCertified if a draw differs from its declaration."""
    for length in range(1, toy.num_tokens):
        for output in itertools.product(range(toy.target.vocab_size), repeat=length):
            if toy.limit(output) and not set(output) & set(toy.stop_token_ids):
                _Probe(toy, make_proposer, steps, output).follow((), ())


@dataclass(frozen=True, slots=True)
class _Probe:
    """The drafts after one output."""

    toy: Toy
    make_proposer: MakeProposer
    steps: Steps
    output: Tokens

    def follow(self, drafted: Tokens, uniforms: tuple[float, ...]) -> None:
        """Look at the token after a draft that these uniforms draw, and at those after each that it may be."""
        place = Place(self.output, drafted)
        edges, tokens, probs = self._draws(place, uniforms)
        if tokens == [NOTHING]:
            return
        self.steps.add(place, probs)
        self.steps.jumps[place] += edges[1:-1]
        drawn: dict[int, float] = defaultdict(float)
        middle: dict[int, float] = {}
        for token, low, high in zip(tokens, edges, edges[1:], strict=False):
            drawn[token] += high - low
            middle[token] = (low + high) / 2
        _compare(self.toy, place, drawn, probs)
        for token in middle if len(drafted) + 1 < self.toy.limit(self.output) else ():
            self.follow((*drafted, token), (*uniforms, middle[token]))

    def _draws(self, place: Place, before: tuple[float, ...]) -> tuple[list[float], list[int], list[float]]:
        """Edges of a uniform's intervals, including 0 and 1, the token drawn in each, and the declared distribution."""
        points = [(index + 0.5) / SWEEP for index in range(SWEEP)]
        swept, probs = self._tokens(place, before, points)
        if (swept, probs) != self._tokens(place, before, points):
            raise _failure(self.toy, place, "differs between two calls with the same uniforms; draw by those given")
        starts = [index for index in range(SWEEP - 1) if swept[index] != swept[index + 1]]
        if len(starts) > MAX_JUMPS:
            raise _failure(
                self.toy, place, f"jumps {len(starts)} times as its uniform grows from 0 to 1; use Distribution.draw"
            )
        low, high = [points[index] for index in starts], [points[index + 1] for index in starts]
        left = [swept[index] for index in starts]
        for _ in range(BISECTIONS if starts else 0):
            middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
            found, _ = self._tokens(place, before, middle)
            low = [m if same == token else a for a, m, same, token in zip(low, middle, found, left, strict=True)]
            high = [b if same == token else m for b, m, same, token in zip(high, middle, found, left, strict=True)]
        return [0.0, *high, 1.0], [*left, swept[-1]], probs

    def _tokens(self, place: Place, before: Sequence[float], points: Sequence[float]) -> tuple[list[int], list[float]]:
        """The token at a place, by its uniform, and the distribution that is declared for it."""
        uniforms = torch.tensor([[*before, point] for point in points], dtype=torch.float64)
        draft, index = self._draft(uniforms), len(before)
        tokens = [NOTHING] * len(points)
        if draft.tokens.shape[1] > index:
            tokens = torch.where(draft.num_proposed > index, draft.tokens[:, index], NOTHING).tolist()
        if set(tokens) == {NOTHING}:
            return tokens, []
        if NOTHING in tokens:
            raise _failure(self.toy, place, "is proposed or not by its own uniform; decide before it is drawn")
        probs = draft.distribution.dense()[:, index].double()
        if (probs - probs[0]).abs().max() > TOLERANCE:
            raise _failure(self.toy, place, "has a declared distribution that depends on the token drawn from it")
        return tokens, probs[0].tolist()

    def _draft(self, uniforms: Tensor) -> Draft:
        """The drafts of n rows after the output by these uniforms, float64 [n, depth], made in a ragged batch."""
        toy, num_rows = self.toy, len(uniforms)
        texts: list[list[int] | None] = []
        for row in range(num_rows):
            texts += [None if row % 4 == 3 else list(toy.prompt[: 1 + row % 3]), [*toy.prompt, *self.output]]
        proposer = self.make_proposer(toy.target, _scripted(toy, self.output, texts, uniforms))
        limits = [toy.num_speculative_tokens if text else 0 for text in texts]
        limits[1::2] = [toy.limit(self.output)] * num_rows
        with torch.inference_mode():
            draft = proposer.propose(_batch(toy, texts, proposer.feature_layers), limits)
        return Draft(draft.tokens[1::2], draft.num_proposed[1::2], draft.distribution[1::2])


def _scripted(toy: Toy, output: Tokens, texts: Sequence[list[int] | None], uniforms: Tensor) -> UniformSource:
    """A source of draft uniforms: those given for odd rows, by place in the draft, 1/2 for the others."""
    script = torch.full((len(texts), toy.num_speculative_tokens), 0.5, dtype=torch.float64)
    script[1::2, : uniforms.shape[1]] = uniforms
    lengths = torch.tensor([len(text) if text else 1 for text in texts])

    def source(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        if (off_branch(roles)[0] != Role.DRAFT).any() or (origins != lengths[seeds]).any():
            what = "must be drawn by the uniforms of Role.DRAFT at the origin of its draft, which is its row's length"
            raise _failure(toy, Place(output, ()), what)
        rows, places = torch.broadcast_tensors(seeds, positions - origins)
        return script[rows, places]

    return source


def _batch(toy: Toy, texts: Sequence[list[int] | None], features: FeatureLayers) -> Batch:
    """A row for each text, None being an idle one; the seed of row r is r."""
    target, num_rows = toy.target, len(texts)
    params = [SamplingParams(max_tokens=64, temperature=1 if text else 0, seed=row) for row, text in enumerate(texts)]
    rows: list[Generation | None] = [None] * num_rows
    for index, text in enumerate(texts):
        if text:
            rows[index] = row = Generation(Request(index, toy.prompt[: len(text)], params[index]), 0.0)
            row.tokens[:] = text
    longest = max(len(text) for text in texts if text)
    capacity = longest + 64
    cache = target.allocate(num_rows, capacity, features=features)
    padded = [[*(text or [0]), *[0] * longest][:longest] for text in texts]
    target.forward(torch.tensor(padded), cache)
    cache.num_cached[:] = [len(text) - 1 if text else 0 for text in texts]
    prompts = [row.request.prompt if row else () for row in rows]
    outputs = [row.output if row else () for row in rows]
    sampling = SamplingState(params, prompts, outputs, target.vocab_size, target.device)
    return Batch(rows, sampling, num_rows, capacity, cache.features, max_draft=toy.num_speculative_tokens, cache=cache)


def _compare(toy: Toy, place: Place, drawn: dict[int, float], declared: Sequence[float]) -> None:
    for token, prob in enumerate(declared):
        if abs(drawn[token] - prob) > TOLERANCE:
            raise _failure(
                toy,
                place,
                f"is {token} with probability {drawn[token]:.6g}, but the draft declares {prob:.6g}; declare the "
                "distribution that the token is drawn from",
            )


def _failure(toy: Toy, place: Place, what: str) -> NotCertified:
    return NotCertified(f"on the toy {toy.name!r}, {place} {what}")
