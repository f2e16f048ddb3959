"""The exact output distribution of the real decode loop, by feeding it every draw that makes a difference.

What the loop does with a uniform changes only where a distribution's threshold is passed. So a few uniforms, one from
each piece between thresholds, weighted by the length of the piece, are as good as all, and the loop's output over them
*is* its distribution. If all thresholds of a pair are multiples of 1/N, the pieces are the N cells of a grid.

*Token and block verification.* One step needs k draft uniforms, k accept uniforms and one for the last token; a whole
run would need the product over its steps. But the loop is deterministic given its uniforms, and what it remembers of
a step is only what was drafted, accepted and drawn. So the tree of such histories is walked: each node fixes one
assignment that leads to it, and runs the loop, from the prompt on, over all pieces of the next step
(`exact_distribution`). A token tree needs a draft and an accept uniform for each of its nodes.

*Coupled verification.* The noise of a position is a waiting time for each token. Only their proportions decide a race,
and those of exponential waiting times are uniform on the simplex. Over three tokens that is a triangle; the token that
wins a race under a distribution p changes where the line from a corner through p is crossed. All such lines of the
distributions in play cut the triangle into polygons whose areas are rational numbers: one point of each, weighted by
its area, stands for all noise (`race_pieces`). A run needs one for each position, whatever is drafted and however often
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
Pieces = Sequence[tuple[float, float]]  # (a uniform, how much of [0, 1) it stands for)


@dataclass(frozen=True, slots=True)
class Each:
    """Pieces, or a number of equal pieces, for the uniform of each draft position; of a tree, of each node."""

    pieces: tuple[int | Pieces, ...]


# for draft, accept and last uniforms; a number of equal pieces
Grid = tuple[int | Pieces | Each, int | Pieces | Each, int | Pieces]


def equal_pieces(count: int) -> Pieces:
    """For thresholds that are multiples of 1/count: the midpoints."""
    return [((i + 0.5) / count, 1 / count) for i in range(count)]


def pieces_between(thresholds: Iterable[float]) -> Pieces:
    """For any thresholds; those that differ by less than 1e-9 are taken for one."""
    edges = [0.0]
    for threshold in sorted(thresholds):
        if edges[-1] + 1e-9 < threshold < 1 - 1e-9:
            edges.append(threshold)
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise([*edges, 1.0])]


@dataclass(frozen=True, slots=True)
class StepUniforms:
    """The uniforms of one step: by draft position, or node of a tree, twice, and for whichever token comes last."""

    draft: tuple[float, ...]
    accept: tuple[float, ...]
    last: float


class ScriptedUniforms:
    """A uniform source that reads from scripts: row seed -> the step beginning at an origin -> its uniforms.

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
        if step is None:  # a step after the one that is being enumerated
            return 0.5
        kind, branch = off_branch(role)
        place: int = branch + (self.tree.num_within(position - origin) if self.tree else position - origin)
        if kind == Role.DRAFT:
            return step.draft[place]
        if kind == Role.ACCEPT:
            return step.accept[place]
        return step.last


@dataclass(frozen=True, slots=True)
class _Node:
    """A history of the loop: a script that leads to it, the tokens emitted by then, its probability."""

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
    """Distribution of the first num_tokens tokens that the decoder emits, fewer behind a stop token: {tokens:
    probability}.

    make_decoder: (uniforms, rule, max_batch_size) -> a fresh decoder. grid: pieces for the uniforms of every step, or
    for those of the step after given tokens, without the prompt. params: their stop tokens end a request; their seed is
    not used. constraint: what the output may say. tree: the shape of the drafts, or None for chains.
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
    """The outcomes of the step after a node, with the weight of the uniforms that lead to each."""
    origin, number = len(runs.prompt) + len(node.tokens), len(node.script)
    num_drafted = runs.gamma if number else 0  # the first token comes from the prefill
    uniforms, weights = zip(*_choices(grid, num_drafted), strict=True)
    scripts = [node.script | {origin: each} for each in uniforms]
    outcomes = runs.step(scripts, number)
    scripts_to = dict(zip(outcomes, scripts, strict=True))
    mass: Counter[_Outcome] = Counter()
    for outcome, weight in zip(outcomes, weights, strict=True):
        mass[outcome] += weight
    return [_Node(scripts_to[each], each.tokens, node.probability * weight) for each, weight in mass.items()]


def _choices(grid: Grid, num_drafted: int) -> Iterable[tuple[StepUniforms, float]]:
    drafts, accepts = (_for_each(each, num_drafted) for each in grid[:2])
    for choice in itertools.product(*drafts, *accepts, *_for_each(grid[2], 1)):
        points, weights = zip(*choice, strict=True)
        yield StepUniforms(points[:num_drafted], points[num_drafted:-1], points[-1]), math.prod(weights)


def _for_each(pieces: int | Pieces | Each, count: int) -> list[Pieces]:
    each = pieces.pieces[:count] if isinstance(pieces, Each) else [pieces] * count
    return [equal_pieces(one) if isinstance(one, int) else one for one in each]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """All tokens emitted up to a step, and what the step drafted."""

    tokens: Tokens
    drafted: Tokens


class _Runs:
    """Runs the real loop, from the prompt on, once for each script."""

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

    def is_over(self, tokens: Tokens) -> bool:
        return len(tokens) == self.params.max_tokens or tokens[-1] in self.stop

    def step(self, scripts: list[dict[int, StepUniforms]], number: int) -> list[_Outcome]:
        """What became of step `number`, the prefill being step 0, in the run of each script."""
        drafts: list[Tensor] = []

        @Rule
        def recording(
            target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
        ) -> Verification:
            drafts.append(draft.tokens.clone())  # a recorded step's place is used again
            return self.rule(target, draft, accept_uniforms, final_uniforms)

        decoder = self.make_decoder(ScriptedUniforms(scripts, self.tree), recording, len(scripts))
        rows = _run(decoder, self.prompt, self.params, len(scripts), self.constraint)
        if number == 0:
            return [_Outcome(tuple(row.output[:1]), ()) for row in rows]
        drafted = drafts[len(scripts) + number - 1]  # one call for each prefill, then one for each step of the batch
        return [_outcome(row, number, drafted[index].tolist()) for index, row in enumerate(rows)]


def _run(
    decoder: Decoder, prompt: Tokens, params: SamplingParams, num_rows: int, constraint: Constraint | None
) -> list[Generation]:
    """The same request in so many rows, row r with the seed r."""
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
RacePieces = Sequence[tuple[tuple[float, ...], Fraction]]  # (a uniform for each token, how much noise it stands for)


def race_pieces(distributions: Iterable[Sequence[float]]) -> RacePieces:
    """Noise that stands for all noise, as far as races under these distributions go; the weights sum to 1.

    distributions: of two or three tokens, the same number in each; probabilities are taken for the nearest fractions
    with a denominator of at most 10,000.
    Raises ValueError for distributions over more tokens.
    """
    exact = {tuple(Fraction(prob).limit_denominator(10_000) for prob in distribution) for distribution in distributions}
    vocab_size = len(next(iter(exact)))
    if vocab_size not in (2, 3):
        raise ValueError(f"distributions over {vocab_size} tokens must be over two or three; cut the toy's vocabulary")
    corners = [tuple(Fraction(int(i == j)) for j in range(3)) for i in range(3)]
    polygons: list[list[Point]] = [corners]
    for distribution, (a, b) in itertools.product(sorted(exact), itertools.combinations(range(vocab_size), 2)):
        if distribution[a] or distribution[b]:
            polygons = [half for polygon in polygons for half in _halves(polygon, a, b, distribution)]
    return [(_noise_at(_centre(polygon))[:vocab_size], _area(polygon)) for polygon in polygons]


def _halves(polygon: list[Point], a: int, b: int, distribution: Point) -> list[list[Point]]:
    """A convex polygon cut where tokens a and b wait equally long under a distribution."""
    sides = [point[a] * distribution[b] - point[b] * distribution[a] for point in polygon]
    halves = [_clipped(polygon, [sign * side for side in sides]) for sign in (1, -1)]
    return [half for half in halves if _area(half) > 0]


def _clipped(polygon: list[Point], sides: list[Fraction]) -> list[Point]:
    """What of a convex polygon lies on the side that is not negative."""
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
    """As a part of the whole triangle."""
    return sum((_determinant(polygon[0], b, c) for b, c in itertools.pairwise(polygon[1:])), Fraction(0))


def _determinant(p: Point, q: Point, r: Point) -> Fraction:
    def minor(i: int, j: int) -> Fraction:
        return q[i] * r[j] - q[j] * r[i]

    return p[0] * minor(1, 2) - p[1] * minor(0, 2) + p[2] * minor(0, 1)


def _centre(polygon: list[Point]) -> Point:
    return tuple(sum(coordinates, Fraction(0)) / len(polygon) for coordinates in zip(*polygon, strict=True))


def _noise_at(shares: Point) -> tuple[float, ...]:
    """Uniforms whose waiting times, -log(1 - u), are these shares."""
    return tuple(-math.expm1(-float(share)) for share in shares)


class ScriptedNoise:
    """A uniform source for coupled draws: float64 [rows, positions, vocab], from a first position on, by row seed."""

    def __init__(self, noise: Tensor, first_position: int) -> None:
        self._noise, self._first_position = noise, first_position

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        if (roles != Role.COUPLED).any():
            raise ValueError(f"roles={roles.tolist()} must be {int(Role.COUPLED)}: here all draws are coupled")
        places = (positions - self._first_position).clamp(max=self._noise.shape[1] - 1)  # padding may stand beyond
        return self._noise[seeds, places, origins]


def coupled_runs(
    make_decoder: MakeDecoder,
    prompt: Tokens,
    pieces: Sequence[RacePieces],
    params: SamplingParams | None = None,
    rule: VerificationRule = verify_coupled,
    constraint: Constraint | None = None,
) -> list[tuple[Tokens, Fraction]]:
    """What the decoder emits, and its probability, for every choice of noise at len(pieces) positions, in one order.

    Arguments as for `exact_distribution`. pieces: of each position in turn, from `race_pieces` of all distributions
    that target or draft may have there.
    """
    choices = list(itertools.product(*pieces))
    noise = torch.tensor([[uniforms for uniforms, _ in choice] for choice in choices], dtype=torch.float64)
    decoder = make_decoder(ScriptedNoise(noise, len(prompt)), rule, len(choices))
    params = replace(params or SamplingParams(), max_tokens=len(pieces))
    rows = _run(decoder, prompt, params, len(choices), constraint)
    weights = [math.prod((weight for _, weight in choice), start=Fraction(1)) for choice in choices]
    return [(tuple(row.output), weight) for row, weight in zip(rows, weights, strict=True)]


def exact_coupled_distribution(runs: Iterable[tuple[Tokens, Fraction]]) -> dict[Tokens, float]:
    """The distribution of what `coupled_runs` emits: {tokens: probability}."""
    distribution: dict[Tokens, Fraction] = defaultdict(Fraction)
    for tokens, weight in runs:
        distribution[tokens] += weight
    return {tokens: float(weight) for tokens, weight in distribution.items()}
