"""The exact output distribution of the real decoding loop, by enumerating the random draws that matter.

The loop's behaviour changes only where a uniform crosses a threshold of some distribution. One uniform from each
interval between thresholds, weighted by the interval's length, therefore represents all uniforms, and the weighted
outputs *are* the output distribution. If all thresholds are multiples of 1/N, the intervals are the N cells of a grid.

*Token and block verification.* A step needs k draft uniforms, k accept uniforms and one final uniform, and a run the
product over its steps. But the loop is deterministic given its uniforms, and a step affects later ones only through
the tokens drafted, accepted and sampled. So we walk the tree of these histories: each node stores one assignment of
uniforms that leads to it, and runs the loop from the prompt over all intervals of the next step
(`exact_distribution`). A token tree needs a draft and an accept uniform per node.

*Coupled verification.* The noise of a position is one waiting time per token. A race depends only on their
proportions, which for exponential waiting times are uniform on the simplex. Over three tokens that is a triangle, and
the winner under a distribution p changes across the lines from a corner through p. The lines of all distributions
involved cut the triangle into polygons with rational areas; one point per polygon, weighted by its area, represents all
noise (`race_pieces`). A run needs one per position, however often that position is drafted
(`exact_coupled_distribution`).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from specdec.constraints.progress import Constraint
from specdec.decoding import Decoder
from specdec.requests import Generation, Request
from specdec.sampling.distributions import Distribution
from specdec.sampling.randomness import Role, UniformSource, off_branch
from specdec.sampling_params import SamplingParams
from specdec.trees.shape import Tree
from specdec.verification import Draft, Rule, Verification, VerificationRule, verify_coupled, verify_tokens

MakeDecoder = Callable[[UniformSource, VerificationRule, int], Decoder]
Tokens = tuple[int, ...]
Pieces = Sequence[tuple[float, float]]  # (a uniform, the length of the interval it represents)


@dataclass(frozen=True, slots=True)
class Each:
    """Pieces, or a number of equal pieces, for the uniform of each draft position or tree node."""

    pieces: tuple[int | Pieces, ...]


# for the draft, accept and final uniforms; a number stands for that many equal pieces
Grid = tuple[int | Pieces | Each, int | Pieces | Each, int | Pieces]


def equal_pieces(count: int) -> Pieces:
    """Midpoints, for thresholds that are multiples of 1/count."""
    return [((i + 0.5) / count, 1 / count) for i in range(count)]


def pieces_between(thresholds: Iterable[float]) -> Pieces:
    """Midpoints between arbitrary thresholds; those less than 1e-9 apart count as one."""
    edges = [0.0]
    for threshold in sorted(thresholds):
        if edges[-1] + 1e-9 < threshold < 1 - 1e-9:
            edges.append(threshold)
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise([*edges, 1.0])]


@dataclass(frozen=True, slots=True)
class StepUniforms:
    """The uniforms of one step: draft and accept uniforms by draft position or tree node, and the final uniform."""

    draft: tuple[float, ...]
    accept: tuple[float, ...]
    last: float


class ScriptedUniforms:
    """A uniform source that reads scripts: row seed -> origin of the step -> its uniforms.

    tree: the shape of the drafts, or None for chains.
    """

    def __init__(self, scripts: list[dict[int, StepUniforms]], tree: Tree | None = None) -> None:
        self.scripts, self.tree = scripts, tree

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        lists = [x.expand(positions.shape).tolist() for x in (seeds, positions, roles, origins)]
        return torch.tensor(
            [[self._one(*key) for key in zip(*row, strict=True)] for row in zip(*lists, strict=True)],
            dtype=torch.float64,
        )

    def _one(self, seed: int, position: int, role: int, origin: int) -> float:
        step = self.scripts[seed].get(origin)
        if step is None:  # a step after the enumerated one
            return 0.5
        kind, branch = off_branch(role)
        index: int = branch + (self.tree.num_within(position - origin) if self.tree else position - origin)
        if kind == Role.DRAFT:
            return step.draft[index]
        if kind == Role.ACCEPT:
            return step.accept[index]
        return step.last


@dataclass(frozen=True, slots=True)
class _Node:
    """A history of the loop: a script that leads to it, the tokens emitted so far, and its probability."""

    script: dict[int, StepUniforms]
    tokens: Tokens
    probability: float


def exact_distribution(
    make_decoder: MakeDecoder,
    prompt: Tokens,
    num_tokens: int,
    grid: Grid | Callable[[Tokens], Grid],
    params: SamplingParams | None = None,
    rule: VerificationRule = verify_tokens,
    constraint: Constraint | None = None,
    tree: Tree | None = None,
) -> dict[Tokens, float]:
    """The exact distribution of the first num_tokens tokens that a decoder emits, fewer after a stop token.

    Args:
        make_decoder: (uniforms, rule, max_batch_size) -> a fresh decoder.
        prompt: token ids.
        num_tokens: number of tokens to emit.
        grid: pieces for the uniforms of every step, or a function from the emitted tokens to those of the next step.
        params: sampling parameters; the seed is not used.
        rule: the verification rule.
        constraint: constrains the output, if given.
        tree: the shape of the drafts, or None for chains.

    Returns:
        {tokens: probability}.
    """
    params = replace(params or SamplingParams(), max_tokens=num_tokens)
    runs = _Runs(make_decoder, prompt, params, rule, constraint, tree)
    grid_at = grid if callable(grid) else lambda tokens: grid
    distribution: dict[Tokens, float] = defaultdict(float)
    nodes = [_Node({}, (), 1.0)]
    while nodes:
        children = [child for node in nodes for child in _expand(runs, node, grid_at(node.tokens))]
        for child in children:
            if runs.is_over(child.tokens):
                distribution[child.tokens] += child.probability
        nodes = [child for child in children if not runs.is_over(child.tokens)]
    return dict(distribution)


def _expand(runs: _Runs, node: _Node, grid: Grid) -> list[_Node]:
    """The outcomes of the step after a node, weighted by the uniforms that lead to each."""
    origin, number = len(runs.prompt) + len(node.tokens), len(node.script)
    num_drafted = runs.max_drafted(node.tokens) if number else 0  # the first token comes from the prefill
    uniforms, weights = zip(*_choices(grid, num_drafted, runs.gamma - num_drafted), strict=True)
    scripts = [node.script | {origin: each} for each in uniforms]
    outcomes = runs.step(scripts, number)
    scripts_to = dict(zip(outcomes, scripts, strict=True))
    mass: Counter[_Outcome] = Counter()
    for outcome, weight in zip(outcomes, weights, strict=True):
        mass[outcome] += weight
    return [_Node(scripts_to[each], each.tokens, node.probability * weight) for each, weight in mass.items()]


def _choices(grid: Grid, num_drafted: int, num_unused: int) -> Iterable[tuple[StepUniforms, float]]:
    """Every combination of pieces for a step's uniforms, with its probability.

    num_unused: positions after the draft, whose uniforms recorded steps read and may not use. They are always 0.5: a
    loop that used them would draw without chance, and emit another distribution.
    """
    drafts, accepts = (_for_each(each, num_drafted) for each in grid[:2])
    unused = (0.5,) * num_unused
    for choice in itertools.product(*drafts, *accepts, *_for_each(grid[2], 1)):
        points, weights = zip(*choice, strict=True)
        step = StepUniforms(points[:num_drafted] + unused, points[num_drafted:-1] + unused, points[-1])
        yield step, math.prod(weights)


def _for_each(pieces: int | Pieces | Each, count: int) -> list[Pieces]:
    each = pieces.pieces[:count] if isinstance(pieces, Each) else [pieces] * count
    return [equal_pieces(one) if isinstance(one, int) else one for one in each]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """All tokens emitted up to a step, and the step's draft."""

    tokens: Tokens
    drafted: Tokens


class _Runs:
    """Runs the real loop from the prompt on, once per script."""

    def __init__(
        self,
        make_decoder: MakeDecoder,
        prompt: Tokens,
        params: SamplingParams,
        rule: VerificationRule,
        constraint: Constraint | None,
        tree: Tree | None,
    ) -> None:
        self.make_decoder, self.prompt, self.params, self.rule = make_decoder, prompt, params, rule
        self.constraint, self.tree = constraint, tree
        self.stop = frozenset(params.stop_token_ids)
        self.gamma = make_decoder(ScriptedUniforms([]), rule, 1).num_speculative_tokens

    def max_drafted(self, tokens: Tokens) -> int:
        """How many tokens the step after these may draft: the last of those to be emitted is never drafted."""
        limit = self.params.max_tokens - len(tokens) - 1
        return min(self.gamma, self.tree.num_within(limit) if self.tree else limit)

    def is_over(self, tokens: Tokens) -> bool:
        return len(tokens) == self.params.max_tokens or tokens[-1] in self.stop

    def step(self, scripts: list[dict[int, StepUniforms]], number: int) -> list[_Outcome]:
        """The outcome of step `number` in the run of each script; the prefill is step 0."""
        drafts: list[Tensor] = []

        @Rule
        def recording(
            target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
        ) -> Verification:
            drafts.append(draft.tokens.clone())  # recorded steps reuse the buffer
            return self.rule(target, draft, accept_uniforms, final_uniforms)

        decoder = self.make_decoder(ScriptedUniforms(scripts, self.tree), recording, len(scripts))
        rows = _run(decoder, self.prompt, self.params, len(scripts), self.constraint)
        if number == 0:
            return [_Outcome(tuple(row.output[:1]), ()) for row in rows]
        drafted = drafts[len(scripts) + number - 1]  # one call per prefill, then one per step of the batch
        return [_outcome(row, number, drafted[index].tolist()) for index, row in enumerate(rows)]


def _run(
    decoder: Decoder, prompt: Tokens, params: SamplingParams, num_rows: int, constraint: Constraint | None
) -> list[Generation]:
    """Run the same request in num_rows rows, row r with seed r."""
    stop = frozenset(params.stop_token_ids)
    requests = [
        Request(seed, prompt, replace(params, seed=seed), stop, constraint=constraint) for seed in range(num_rows)
    ]
    return sorted(decoder.run(requests), key=lambda row: row.request.index)


def _outcome(row: Generation, number: int, drafted: list[int]) -> _Outcome:
    num_emitted = 1 + sum(step.num_accepted + (step.last is not None) for step in row.steps[:number])
    return _Outcome(tuple(row.output[:num_emitted]), tuple(drafted[: row.steps[number - 1].num_drafted]))


# ---- coupled verification

Point = tuple[Fraction, ...]  # shares of three waiting times, which sum to 1
RacePieces = Sequence[tuple[tuple[float, ...], Fraction]]  # (one uniform per token, the probability it represents)


def race_pieces(distributions: Iterable[Sequence[float]]) -> RacePieces:
    """Weighted noise that represents all noise in races under these distributions; the weights sum to 1.

    distributions: over two or three tokens, all the same; probabilities are rounded to fractions with denominators of
    at most 10,000.
    Raises ValueError for distributions over more tokens.
    """
    exact = {tuple(Fraction(prob).limit_denominator(10_000) for prob in distribution) for distribution in distributions}
    vocab_size = len(next(iter(exact)))
    if vocab_size not in (2, 3):
        raise ValueError(f"distributions over {vocab_size} tokens must be over two or three; use a smaller vocabulary")
    corners = [tuple(Fraction(int(i == j)) for j in range(3)) for i in range(3)]
    polygons: list[list[Point]] = [corners]
    for distribution, (a, b) in itertools.product(sorted(exact), itertools.combinations(range(vocab_size), 2)):
        if distribution[a] or distribution[b]:
            polygons = [half for polygon in polygons for half in _halves(polygon, a, b, distribution)]
    return [(_noise_at(_center(polygon))[:vocab_size], _area(polygon)) for polygon in polygons]


def _halves(polygon: list[Point], a: int, b: int, distribution: Point) -> list[list[Point]]:
    """Cut a convex polygon where tokens a and b have equal waiting times under a distribution."""
    sides = [point[a] * distribution[b] - point[b] * distribution[a] for point in polygon]
    halves = [_clipped(polygon, [sign * side for side in sides]) for sign in (1, -1)]
    return [half for half in halves if _area(half) > 0]


def _clipped(polygon: list[Point], sides: list[Fraction]) -> list[Point]:
    """The part of a convex polygon on the non-negative side."""
    kept: list[Point] = []
    for i, (point, side) in enumerate(zip(polygon, sides, strict=True)):
        before, side_before = polygon[i - 1], sides[i - 1]
        if side * side_before < 0:
            share = side_before / (side_before - side)
            kept.append(tuple(x + share * (y - x) for x, y in zip(before, point, strict=True)))
        if side >= 0:
            kept.append(point)
    return kept


def _area(polygon: list[Point]) -> Fraction:
    """Area relative to the whole triangle."""
    return sum((_determinant(polygon[0], b, c) for b, c in itertools.pairwise(polygon[1:])), Fraction(0))


def _determinant(p: Point, q: Point, r: Point) -> Fraction:
    def minor(i: int, j: int) -> Fraction:
        return q[i] * r[j] - q[j] * r[i]

    return p[0] * minor(1, 2) - p[1] * minor(0, 2) + p[2] * minor(0, 1)


def _center(polygon: list[Point]) -> Point:
    return tuple(sum(coordinates, Fraction(0)) / len(polygon) for coordinates in zip(*polygon, strict=True))


def _noise_at(shares: Point) -> tuple[float, ...]:
    """Uniforms whose waiting times, -log(1 - u), are these shares."""
    return tuple(-math.expm1(-float(share)) for share in shares)


class ScriptedNoise:
    """A uniform source for coupled draws. noise: float64 [rows, positions, vocab] by row seed, from first_position."""

    def __init__(self, noise: Tensor, first_position: int) -> None:
        self._noise, self._first_position = noise, first_position

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        if (roles != Role.COUPLED).any():
            raise ValueError(f"roles={roles.tolist()} must be {int(Role.COUPLED)}: all draws are coupled here")
        index = (positions - self._first_position).clamp(max=self._noise.shape[1] - 1)  # padding may lie beyond
        return self._noise[seeds, index, origins]


def coupled_runs(
    make_decoder: MakeDecoder,
    prompt: Tokens,
    pieces: Sequence[RacePieces],
    params: SamplingParams | None = None,
    rule: VerificationRule = verify_coupled,
    constraint: Constraint | None = None,
) -> list[tuple[Tokens, Fraction]]:
    """The decoder's output and its probability for every choice of noise at len(pieces) positions, in a fixed order.

    Arguments as for `exact_distribution`. pieces: for each position, `race_pieces` of all distributions that target or
    draft can have there.
    """
    choices = list(itertools.product(*pieces))
    noise = torch.tensor([[uniforms for uniforms, _ in choice] for choice in choices], dtype=torch.float64)
    decoder = make_decoder(ScriptedNoise(noise, len(prompt)), rule, len(choices))
    params = replace(params or SamplingParams(), max_tokens=len(pieces))
    rows = _run(decoder, prompt, params, len(choices), constraint)
    weights = [math.prod((weight for _, weight in choice), start=Fraction(1)) for choice in choices]
    return [(tuple(row.output), weight) for row, weight in zip(rows, weights, strict=True)]


def exact_coupled_distribution(runs: Iterable[tuple[Tokens, Fraction]]) -> dict[Tokens, float]:
    """The output distribution from `coupled_runs`: {tokens: probability}."""
    distribution: dict[Tokens, Fraction] = defaultdict(Fraction)
    for tokens, weight in runs:
        distribution[tokens] += weight
    return {tokens: float(weight) for tokens, weight in distribution.items()}
