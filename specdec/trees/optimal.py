"""Which tree is best, by how often a draft's siblings were accepted, and by what steps cost.

Source: Chen et al. 2024 (Sequoia, arXiv:2402.12374).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.runtime.checks import require
from specdec.runtime.json_files import fields, finite_number, probabilities, read_json
from specdec.trees.shape import MAX_LEVELS, MAX_NODES, RankPath, Tree

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
        for tree in optimal_trees(acceptance[:depth], min(len(step_s) - 1, MAX_NODES)):
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
        require(self.level_cost >= 0, f"level_cost={self.level_cost} must be at least 0")

    @classmethod
    def load(cls, path: Path) -> Rates:
        """From JSON with these two. Raises ValueError for anything else."""

        def make(content: Any) -> Rates:
            levels = fields(content)["acceptance"]
            if not isinstance(levels, list):
                raise ValueError("acceptance must be a list of levels")
            acceptance = tuple(probabilities(level, "each level of acceptance") for level in levels)
            return cls(acceptance, finite_number(content["level_cost"], "level_cost"))

        return read_json(path, "acceptance must be JSON with acceptance and level_cost", make)


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
    require(1 <= num_nodes <= MAX_NODES, f"num_nodes={num_nodes} must lie in [1, {MAX_NODES}]")
    require(1 <= len(acceptance) <= MAX_LEVELS, f"acceptance of {len(acceptance)} levels must have 1 to {MAX_LEVELS}")
    for depth, rates in enumerate(acceptance):
        require(
            all(0 <= rate <= 1 for rate in rates) and sum(rates) <= 1 + 1e-9,
            f"acceptance[{depth}]={list(rates)} must be probabilities that sum to at most 1: one sibling is accepted",
        )
    require(
        bool(acceptance[0]) and acceptance[0][0] > 0, "acceptance[0][0] must be above 0: else no tree accepts anything"
    )


# where nothing was measured: each further sibling half as good as the one before, and deeper levels like the first
USUAL_RATES = Rates(((0.5, 0.16, 0.08, 0.04, 0.02, 0.01),) * 8)
