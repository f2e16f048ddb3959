"""Token trees: several continuations proposed at once, scored by one target call, verified without loss.

A node's children are *siblings*: alternatives for one position, drawn without replacement from the draft's law there.
Verification walks down from the root. At a node it tries the siblings in turn, each as `verify_tokens` tries a token;
after a rejection the target's law becomes the residual, norm(max(target - draft, 0)), and the draft's law is what the
next sibling was drawn from: without the rejected one, renormalised. The first sibling that is accepted is the next
node. Where none is, the last residual gives the recovered token; at a leaf the target's law gives the bonus token.

Why the token kept at a position has the target's law: with one sibling this is the rule of `specdec.verification`, for
any target law. What remains after a rejection is to draw from the residual, which is the same task with a sibling less.
A chain is a tree with one path, for which this is `verify_tokens`.

Where the draft's law has no token left for a further sibling (greedy drafting, a narrow top-k), the most probable of
the others is proposed with certainty, so with a one-hot law: at temperature 0 siblings are the draft's first choices.

Sources: Miao et al. 2024 (SpecInfer, arXiv:2305.09781), multi-step speculative sampling; Chen et al. 2024 (Sequoia,
arXiv:2402.12374), sampling without replacement and the optimal tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.sampling import Dense, Law, OneHot, Partial
from specdec.verification import Draft, Verification, residual, verify_coupled, verify_tokens

MOST_NODES = 512
MOST_LEVELS = 24
RankPath = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """The shape of a draft: its nodes as rank paths, in the notation of Medusa and EAGLE.

    paths: (0,) is the first choice after the text, (1,) the second, (0, 2) the third choice after the first; in any
    order, they are kept level by level, siblings together.
    parents: of each node its parent's number, -1 for the root, which is the text. families: the nodes that have
    children, the root first if it has, in order. widths: nodes of each level.
    Raises ValueError for a node without its parent, a node twice, a rank without the one before it, an empty path, no
    node, more than 512 nodes or 24 levels.
    """

    paths: tuple[RankPath, ...]
    parents: tuple[int, ...] = field(init=False, compare=False, repr=False)
    families: tuple[int, ...] = field(init=False, compare=False, repr=False)
    widths: tuple[int, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        paths = sorted(_checked(self.paths), key=lambda path: (len(path), path))
        numbers = {(): -1} | {path: number for number, path in enumerate(paths)}
        parents = tuple(numbers[path[:-1]] for path in paths)
        widths = tuple(len(list(level)) for _, level in groupby(map(len, paths)))
        for name, value in (("paths", paths), ("parents", parents), ("families", sorted(set(parents)))):
            object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "widths", widths)

    @classmethod
    def chain(cls, num_tokens: int) -> Tree:
        """One path."""
        return cls.balanced([1] * num_tokens)

    @classmethod
    def balanced(cls, widths: Sequence[int]) -> Tree:
        """Every node of level i has widths[i] children. Raises ValueError also for a width below 1."""
        if any(width < 1 for width in widths):
            raise ValueError(f"widths={list(widths)} must be at least 1 on each level; leave out levels without a node")
        level: list[RankPath] = [()]
        paths: list[RankPath] = []
        for width in widths:
            if len(paths) + len(level) * width > MOST_NODES:
                raise ValueError(f"widths={list(widths)} must give at most {MOST_NODES} nodes; make levels narrower")
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(tuple(paths))

    @classmethod
    def of_parents(cls, parents: Sequence[int]) -> Tree:
        """The tree with these parents, in the order that `parents` has."""
        paths: dict[int, RankPath] = {-1: ()}
        num_children: dict[int, int] = {}
        for number, parent in enumerate(parents):
            paths[number] = (*paths[parent], num_children.get(parent, 0))
            num_children[parent] = num_children.get(parent, 0) + 1
        return cls(tuple(paths[number] for number in range(len(parents))))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def depth(self) -> int:
        """Levels, which is how many tokens may be accepted."""
        return len(self.widths)

    @property
    def depths(self) -> tuple[int, ...]:
        """Level of each node, from 1 on."""
        return tuple(map(len, self.paths))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Place of each node among its siblings."""
        return tuple(path[-1] for path in self.paths)

    @property
    def ancestors(self) -> Tensor:
        """Which nodes stand before a node or are it: bool [nodes, nodes], row by row."""
        return torch.tensor(_lineage_mask(self.parents), dtype=torch.bool).view(len(self), len(self))

    def lineage(self, node: int) -> list[int]:
        """The nodes on the way to a node, itself included, from the first level on; -1 is the root."""
        way: list[int] = []
        while node >= 0:
            way.append(node)
            node = self.parents[node]
        return way[::-1]

    def num_within(self, depth: int) -> int:
        """Nodes of the first levels, as many as `depth` says: they stand before all others."""
        return sum(self.widths[: max(depth, 0)])

    def cut(self, depth: int) -> Tree:
        """The first levels only."""
        return self if depth >= self.depth else Tree(self.paths[: self.num_within(depth)])

    def num_children(self, node: int, num_nodes: int | None = None) -> int:
        """Children of a node, -1 for the root, among the first num_nodes nodes."""
        return self.parents[:num_nodes].count(node)

    def save(self, path: Path, **about: Any) -> None:
        """Write JSON that `load` reads. about: what else is to be remembered, such as where it is from."""
        path.write_text(json.dumps({"paths": self.paths, **about}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tree:
        """A tree from JSON: an object with `paths`, or a list of them. Raises ValueError for anything else."""
        try:
            content = json.loads(path.read_text())
            paths = content["paths"] if isinstance(content, dict) else content
            return cls(tuple(tuple(each) for each in paths))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"tree={str(path)!r} must be a JSON file with rank paths such as [[0], [1], [0, 0]]: {error!r}"
            ) from error


def as_tree(tree: Tree | Iterable[Sequence[int]] | str | Path) -> Tree:
    """A tree from itself, from rank paths or from a file."""
    if isinstance(tree, Tree):
        return tree
    return Tree.load(Path(tree)) if isinstance(tree, str | Path) else Tree(tuple(map(tuple, tree)))


@lru_cache(maxsize=256)
def tree_of(parents: tuple[int, ...]) -> Tree:
    """The tree that a draft has."""
    return Tree.of_parents(parents)


def _checked(paths: Iterable[Sequence[int]]) -> list[RankPath]:
    known = set()
    checked = []
    for path in map(tuple, paths):
        _require(len(path) > 0, "tree path () must have a rank; the root is the text and no node of its own")
        _require(all(isinstance(rank, int) and rank >= 0 for rank in path), f"tree path {path} must hold ranks >= 0")
        _require(path not in known, f"tree path {path} must be given once, not twice")
        known.add(path)
        checked.append(path)
    _require(0 < len(known) <= MOST_NODES, f"a tree of {len(known)} nodes must have from 1 to {MOST_NODES}")
    depth = max(map(len, known))
    _require(depth <= MOST_LEVELS, f"a tree of {depth} levels must have at most {MOST_LEVELS}")
    for path in checked:
        parent, rank = path[:-1], path[-1]
        _require(not parent or parent in known, f"tree path {path} must have its parent {parent} in the tree; add it")
        _require(
            rank == 0 or (*parent, rank - 1) in known,
            f"tree path {path} leaves a gap: rank {rank - 1} must be in the tree before rank {rank}; add "
            f"{(*parent, rank - 1)}",
        )
    return checked


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _lineage_mask(parents: Sequence[int]) -> list[list[bool]]:
    """For each column which columns stand before it, or are it."""
    rows: list[list[bool]] = []
    for number, parent in enumerate(parents):
        row = list(rows[parent]) if parent >= 0 else [False] * len(parents)
        row[number] = True
        rows.append(row)
    return rows


# ---- a tree's columns in a model's call


@dataclass(frozen=True, slots=True)
class Branches:
    """Which tokens that stand behind a cache's valid ones see each other: each its ancestors, itself and what is valid.

    parents: of each column, the column it follows, -1 for the last valid token; a parent stands before its children.
    first: columns before it were fed by earlier calls; a call feeds those from it on.
    """

    parents: tuple[int, ...]
    first: int = 0

    @classmethod
    def behind_root(cls, parents: Sequence[int]) -> Branches:
        """The columns of a target call: the newest token of the text, and behind it the nodes of a tree."""
        return cls((-1, *(parent + 1 for parent in parents)))

    @property
    def width(self) -> int:
        """Columns that the call feeds."""
        return len(self.parents) - self.first


@lru_cache(maxsize=512)
def offsets(branches: Branches, device: torch.device) -> Tensor:
    """How far each fed column's position is behind the first one's that follows the valid tokens: int64 [width]."""
    depths: list[int] = []
    for parent in branches.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return torch.tensor(depths[branches.first :], device=device)


@lru_cache(maxsize=512)
def visible(branches: Branches, device: torch.device) -> Tensor:
    """Which of all columns each fed column sees: bool [width, columns]."""
    return torch.tensor(_lineage_mask(branches.parents)[branches.first :], dtype=torch.bool, device=device)


@lru_cache(maxsize=512)
def ways(branches: Branches, device: torch.device) -> Tensor:
    """The columns on the way to each fed column, itself last, by position: int64 [width, most positions]."""
    lines = [[i for i, sees in enumerate(row) if sees] for row in _lineage_mask(branches.parents)[branches.first :]]
    most = max(map(len, lines))
    return torch.tensor([[*line, *[line[-1]] * (most - len(line))] for line in lines], device=device)


# ---- the law of a sibling


def without(law: Law, taken: Tensor) -> tuple[Law, Tensor]:
    """A law without some tokens, not renormalised, and its mass.

    law: [...]. taken: int64 [..., n]. Returns laws [...] and float [..., 1]; where the mass is 0 no token is left.
    """
    if isinstance(law, OneHot):
        return law, (law.tokens.unsqueeze(-1) != taken).all(-1, keepdim=True).double()
    if isinstance(law, Partial):
        inner, mass = without(law.inner, _places(law, taken))
        assert isinstance(inner, Dense)
        return Partial(inner, law.tokens, law.vocab_size), mass
    probs = law.probs.scatter(-1, taken, 0.0)
    return Dense(probs), probs.sum(-1, keepdim=True)


def sibling_law(law: Law, taken: Tensor, tokens: Tensor) -> Law:
    """The law that a sibling was drawn from, given those before it: theirs without these, or one-hot if that is empty.

    law: the family's, [...]. taken: int64 [..., n], the siblings before. tokens: int64 [...], the sibling.
    """
    if taken.shape[-1] == 0:
        return law
    if isinstance(law, OneHot):
        left = without(law, taken)[1].squeeze(-1) > 0
        return OneHot(torch.where(left, law.tokens, tokens), law.vocab_size)
    if isinstance(law, Partial):
        inner = sibling_law(law.inner, _places(law, taken), _places(law, tokens))
        assert isinstance(inner, Dense)
        return Partial(inner, law.tokens, law.vocab_size)
    rest, mass = without(law, taken)
    certain = torch.zeros_like(law.probs).scatter(-1, tokens.unsqueeze(-1), 1.0)
    return Dense(torch.where(mass > 0, rest.dense() / mass, certain))


def _places(law: Partial, tokens: Tensor) -> Tensor:
    """Where tokens, which the law is over, stand among its own."""
    return torch.searchsorted(law.tokens, tokens).clamp(max=len(law.tokens) - 1)


# ---- verification


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tree as tensors. By column, the root's and then the nodes': first_child, num_children, family, int64 [k + 1].

    By node: number, parent, the column of its parent, and depth, int64 [k]; lineage: float [k, k], 1 where the node of
    the row stands on the way to that of the column, or is it.
    """

    first_child: Tensor
    num_children: Tensor
    family: Tensor
    number: Tensor
    parent: Tensor
    depth: Tensor
    lineage: Tensor
    most_children: tuple[int, ...]  # by level of the parent

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> _Layout:
        counts = [tree.num_children(node) for node in range(-1, len(tree))]
        firsts = [tree.parents.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        families = [tree.families.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        levels = (0, *tree.depths)
        most = tuple(
            max(count for count, level in zip(counts, levels, strict=True) if level == depth)
            for depth in range(tree.depth)
        )
        before = [parent + 1 for parent in tree.parents]
        lists = (firsts, counts, families, range(len(tree)), before, tree.depths)
        first_child, num_children, family, number, parent, depth = (torch.tensor(each, device=device) for each in lists)
        lineage = tree.ancestors.T.float().to(device)
        return cls(first_child, num_children, family, number, parent, depth, lineage, most)


@lru_cache(maxsize=256)
def _layout(parents: tuple[int, ...], device: torch.device) -> _Layout:
    return _Layout.of(tree_of(parents), device)


def verify_tree(target: Law, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Verify a tree by recursive rejection over siblings; a draft that is a chain by `verify_tokens`.

    target: the target's laws [batch, k + 1], after the text and after each of the k nodes.
    accept_uniforms: float64 [batch, k], one for each node's test.
    final_uniforms: float64 [batch, levels + 1]; column i draws the last token if i tokens were accepted.
    Source: Miao et al. 2024, Algorithm 2; Chen et al. 2024, Algorithm 2.
    """
    if draft.parents is None:
        return verify_tokens(target, draft, accept_uniforms, final_uniforms)
    if isinstance(target, OneHot):
        return _follow(target.tokens, draft)
    walk = _Walk(target, draft)
    for level, most_children in enumerate(walk.layout.most_children):
        walk.descend(level, most_children, accept_uniforms)
        if _is_none(walk.going):
            break
    uniform = final_uniforms.gather(1, walk.accepted.unsqueeze(1)).squeeze(1)
    return Verification(walk.accepted, Dense(walk.probs).draw(uniform), walk.path)


def verify_coupled_tree(target: Law, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Coupled verification of a tree: the target draws its own token at each position, and a sibling that is it stays.

    final_uniforms: float64 [batch, levels + 1, vocab], the noise of each position, which siblings have in common.
    """
    if draft.parents is None:
        return verify_coupled(target, draft, accept_uniforms, final_uniforms)
    depths = _layout(draft.parents, draft.tokens.device).depth
    levels = torch.cat([depths.new_zeros(1), depths])
    return _follow(target.draw(final_uniforms[:, levels]), draft)


verify_coupled_tree.needs_noise = True  # type: ignore[attr-defined]  # functions declare no attributes


class _Walk:
    """Where each row stands in its tree, and the law of what comes next there.

    column: int64 [batch], 0 at the root, else node + 1. probs: float [batch, vocab], the target's law there, or the
    residual where siblings were rejected. going: bool [batch], False where the last level accepted nothing.
    """

    def __init__(self, target: Law, draft: Draft) -> None:
        assert draft.parents is not None
        self.target, self.draft = target, draft
        self.layout = _layout(draft.parents, draft.tokens.device)
        self.accepted = torch.zeros_like(draft.lengths)
        self.column, self.going = self.accepted, self.accepted == 0
        self.path = _own_places(draft, len(self.layout.most_children))
        self.probs = target.at(self.column).dense()

    def descend(self, level: int, most_children: int, accept_uniforms: Tensor) -> None:
        """Try the children of each row's node; go to the one that is accepted."""
        law, first = self.draft.law.at(self.layout.family[self.column]), self.layout.first_child[self.column]
        count = torch.minimum(self.layout.num_children[self.column], self.draft.lengths - first)
        taken, chosen = first.new_empty(len(first), 0), torch.full_like(first, -1)
        for rank in range(most_children):
            tried = self.going & (chosen < 0) & (rank < count)
            if _is_none(tried):
                break
            place = (first + rank).clamp(max=self.draft.tokens.shape[1] - 1).unsqueeze(1)
            token = self.draft.tokens.gather(1, place).squeeze(1)
            sibling = sibling_law(law, taken, token)
            passed = self._passes(sibling, token, accept_uniforms.gather(1, place).squeeze(1)) & tried
            chosen = torch.where(passed, first + rank, chosen)
            self._reject(sibling, tried & ~passed)
            taken = torch.cat([taken, token.unsqueeze(1)], 1)
        self._enter(level, chosen)

    def _passes(self, sibling: Law, token: Tensor, uniform: Tensor) -> Tensor:
        # strict <, as in `verify_tokens`: at u = 0 an impossible token must lose
        return uniform * sibling.prob(token) < Dense(self.probs).prob(token)

    def _reject(self, sibling: Law, rejected: Tensor) -> None:
        if not _is_none(rejected):
            self.probs = torch.where(rejected.unsqueeze(1), residual(self.probs, sibling), self.probs)

    def _enter(self, level: int, chosen: Tensor) -> None:
        self.going = chosen >= 0
        self.accepted = self.accepted + self.going
        self.column = torch.where(self.going, chosen + 1, self.column)
        self.path[:, level] = torch.where(self.going, chosen, level)
        if not _is_none(self.going):
            here = self.target.at(self.column).dense()
            self.probs = torch.where(self.going.unsqueeze(1), here, self.probs)


def _follow(tokens: Tensor, draft: Draft) -> Verification:
    """Keep the nodes that are what the target says: tokens int64 [batch, k + 1], after the text and after each node."""
    assert draft.parents is not None
    layout = _layout(draft.parents, tokens.device)
    proposed = layout.number < draft.lengths.unsqueeze(1)
    agrees = (draft.tokens == tokens[:, layout.parent]) & proposed
    on_path = agrees.float() @ layout.lineage == layout.depth  # the node and all before it; siblings are different
    accepted = on_path.sum(1)
    places = torch.where(on_path, layout.number, len(layout.number)).sort(1).values
    own = _own_places(draft, len(layout.most_children))
    path = torch.where(own < accepted.unsqueeze(1), places[:, : own.shape[1]], own)
    end = torch.where(on_path, layout.number + 1, 0).amax(1, keepdim=True)
    return Verification(accepted, tokens.gather(1, end).squeeze(1), path)


def _own_places(draft: Draft, num_levels: int) -> Tensor:
    """The path that moves nothing: 0, 1, ... in each row."""
    return torch.arange(num_levels, device=draft.tokens.device).repeat(len(draft.tokens), 1)


def _is_none(mask: Tensor) -> bool:
    """Whether nothing is left to do, where to ask costs nothing; elsewhere, and where steps are recorded, never."""
    return mask.device.type == "cpu" and not bool(mask.any())


# ---- the best tree for measured acceptance

Acceptance = Sequence[Sequence[float]]
Values = npt.NDArray[np.float64]


def expected_accepted(tree: Tree, acceptance: Acceptance) -> float:
    """Expected number of accepted tokens: the sum over nodes of the product of acceptance on the way to each.

    acceptance[d][r]: probability that the sibling of rank r is the accepted one, given that its parent, d tokens
    behind the text, was accepted; 0 beyond what is given.
    """
    values: list[float] = []
    for path, parent in zip(tree.paths, tree.parents, strict=True):
        here = _rate(acceptance, len(path) - 1, path[-1])
        values.append(here * (values[parent] if parent >= 0 else 1.0))
    return float(sum(values))


def optimal_trees(acceptance: Acceptance, num_nodes: int) -> list[Tree]:
    """The trees of 1, 2, ..., num_nodes nodes that expect to have most tokens accepted, without those of idle nodes.

    acceptance: as for `expected_accepted`. Dynamic programming from the deepest level up, over how many nodes the
    children of a node and all below them have.
    Raises ValueError for rates outside [0, 1], siblings' rates that sum to more than 1, or a size out of range.
    Source: Chen et al. 2024 (Sequoia), section 3.1, there with rates that are the same on every level.
    """
    _check_acceptance(acceptance, num_nodes)
    below = [np.zeros(num_nodes + 1)]  # of a node by its level, the deepest first: value of so many nodes below it
    splits: list[list[npt.NDArray[np.int64]]] = []
    for rates in reversed(acceptance):
        values, sizes = _family(np.asarray(rates), below[-1])
        below.append(values)
        splits.append(sizes)
    splits.reverse()
    trees = []
    for number in range(1, num_nodes + 1):
        paths = tuple(_unfold(splits, 0, number))
        if len(paths) == number:
            trees.append(Tree(paths))
    return trees


def optimal_tree(acceptance: Acceptance, num_nodes: int, level_cost: float = 0.0) -> Tree:
    """The best tree of at most num_nodes nodes; see `optimal_trees`.

    level_cost: what drawing one level costs, in plain steps of the target. The best is that with most emitted tokens
    for the cost of a step, with as many levels as pay.
    """
    _check_acceptance(acceptance, num_nodes)
    deepest = len(acceptance) if level_cost else 1
    trees = [
        optimal_trees(acceptance[: depth if level_cost else None], num_nodes)[-1] for depth in range(1, deepest + 1)
    ]
    return max(trees, key=lambda tree: (1 + expected_accepted(tree, acceptance)) / (1 + tree.depth * level_cost))


def tree_that_pays(acceptance: Acceptance, step_s: Sequence[float], level_s: float) -> Tree | None:
    """The tree that emits most tokens per second, or None where plain decoding does.

    step_s: seconds of a target step over 1, 2, ... tokens, of which a tree's step has one more than nodes.
    level_s: seconds of drawing one level.
    """
    best, most = None, 1 / step_s[0]
    for depth in range(1, len(acceptance) + 1):
        for tree in optimal_trees(acceptance[:depth], min(len(step_s) - 1, MOST_NODES)):
            tokens_per_s = (1 + expected_accepted(tree, acceptance)) / (step_s[len(tree)] + tree.depth * level_s)
            if tokens_per_s > most:
                best, most = tree, tokens_per_s
    return best


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured of a draft: acceptance as for `expected_accepted`, level_cost as for `optimal_tree`.

    Raises ValueError for acceptance that is none, or a negative cost.
    """

    acceptance: tuple[tuple[float, ...], ...]
    level_cost: float = 0.1

    def __post_init__(self) -> None:
        _check_acceptance(self.acceptance, 1)
        _require(self.level_cost >= 0, f"level_cost={self.level_cost} must be at least 0")

    @classmethod
    def load(cls, path: Path) -> Rates:
        """From JSON with these two. Raises ValueError for anything else."""
        try:
            content = json.loads(path.read_text())
            return cls(tuple(map(tuple, content["acceptance"])), float(content["level_cost"]))
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"acceptance={str(path)!r} must be JSON with acceptance and level_cost: {error!r}"
            ) from error


def _family(rates: Values, below: Values) -> tuple[Values, list[npt.NDArray[np.int64]]]:
    """Values of 0, 1, ... nodes for all children of a node, and for each rank how many the sibling's own part has.

    below: the value of 0, 1, ... nodes below one of these children.
    """
    size = len(below)
    values, sizes = np.zeros(size), []
    for rate in rates[::-1]:  # the last rank first: values are those of this rank and the ones after it
        own = np.full(size, -np.inf)
        own[1:] = rate * (1 + below[:-1])
        best, chosen = np.zeros(size), np.zeros(size, dtype=np.int64)
        for number in range(1, size):
            options = own[1 : number + 1] + values[number - 1 :: -1][:number]
            part = int(options.argmax())
            if options[part] > 0:
                best[number], chosen[number] = options[part], part + 1
        values = best
        sizes.append(chosen)
    return values, sizes[::-1]


def _unfold(splits: Sequence[Sequence[npt.NDArray[np.int64]]], level: int, number: int) -> Iterable[RankPath]:
    """The paths of the best `number` nodes below a node."""
    if level == len(splits):
        return
    for rank, sizes in enumerate(splits[level]):
        part = int(sizes[number])
        if part == 0:
            return
        yield (rank,)
        for path in _unfold(splits, level + 1, part - 1):
            yield (rank, *path)
        number -= part


def _rate(acceptance: Acceptance, depth: int, rank: int) -> float:
    return acceptance[depth][rank] if depth < len(acceptance) and rank < len(acceptance[depth]) else 0.0


def _check_acceptance(acceptance: Acceptance, num_nodes: int) -> None:
    _require(1 <= num_nodes <= MOST_NODES, f"num_nodes={num_nodes} must lie in [1, {MOST_NODES}]")
    _require(
        1 <= len(acceptance) <= MOST_LEVELS, f"acceptance of {len(acceptance)} levels must have 1 to {MOST_LEVELS}"
    )
    for depth, rates in enumerate(acceptance):
        _require(
            all(0 <= rate <= 1 for rate in rates) and sum(rates) <= 1 + 1e-9,
            f"acceptance[{depth}]={list(rates)} must be probabilities that sum to at most 1: one sibling is accepted",
        )
    _require(
        bool(acceptance[0]) and acceptance[0][0] > 0, "acceptance[0][0] must be above 0: else no tree accepts anything"
    )


# where nothing was measured: each further sibling half as good as the one before, and deeper levels like the first
USUAL_RATES = Rates(((0.5, 0.16, 0.08, 0.04, 0.02, 0.01),) * 8)
