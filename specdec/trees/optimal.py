"""The optimal draft tree, given measured acceptance rates and step costs.

Source: Chen et al. 2024 (Sequoia, arXiv:2402.12374).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.runtime.json_files import fields, finite_number, probabilities, read_json
from specdec.trees.shape import MAX_LEVELS, MAX_NODES, RankPath, Tree

Acceptance = Sequence[Sequence[float]]
Values = npt.NDArray[np.float64]


def expected_accepted(tree: Tree, acceptance: Acceptance) -> float:
    """Expected number of accepted tokens: the sum over nodes of the product of acceptance rates on the path to each.

    acceptance[d][r]: probability that the child of rank r of a node at depth d is accepted, given that the node was;
    0 beyond the ranks and depths given.
    """
    values: list[float] = []
    for path, parent in zip(tree.paths, tree.parents, strict=True):
        rate = _rate(acceptance, len(path) - 1, path[-1])
        values.append(rate * (values[parent] if parent >= 0 else 1.0))
    return float(sum(values))


def optimal_trees(acceptance: Acceptance, num_nodes: int) -> list[Tree]:
    """For each size 1, 2, ..., num_nodes, the tree of that size with the most expected accepted tokens.

    Sizes for which every tree has a node that is never accepted are left out. Dynamic programming from the deepest
    level up, over the number of descendants of a node.
    acceptance: see `expected_accepted`.
    Raises ValueError for rates outside [0, 1], sibling rates that sum to more than 1, or a size out of range.
    Source: Chen et al. 2024 (Sequoia), section 3.1, where rates are the same on every level.
    """
    _check_acceptance(acceptance, num_nodes)
    below = [np.zeros(num_nodes + 1)]  # by level, deepest first: value of a node's 0, 1, ... descendants
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
    """The tree of at most num_nodes nodes that emits the most tokens per unit of step cost; see `optimal_trees`.

    level_cost: cost of drafting one level, in plain target steps. It limits the number of levels.
    """
    _check_acceptance(acceptance, num_nodes)
    deepest = len(acceptance) if level_cost else 1
    trees = [
        optimal_trees(acceptance[: depth if level_cost else None], num_nodes)[-1] for depth in range(1, deepest + 1)
    ]
    return max(trees, key=lambda tree: (1 + expected_accepted(tree, acceptance)) / (1 + tree.depth * level_cost))


def fastest_tree(acceptance: Acceptance, step_s: Sequence[float], level_s: float) -> Tree | None:
    """The tree that emits the most tokens per second, or None if plain decoding is faster.

    step_s: seconds of a target step over 1, 2, ... tokens; a tree's step has one token more than the tree has nodes.
    level_s: seconds to draft one level.
    """
    best, highest = None, 1 / step_s[0]
    for depth in range(1, len(acceptance) + 1):
        for tree in optimal_trees(acceptance[:depth], min(len(step_s) - 1, MAX_NODES)):
            tokens_per_s = (1 + expected_accepted(tree, acceptance)) / (step_s[len(tree)] + tree.depth * level_s)
            if tokens_per_s > highest:
                best, highest = tree, tokens_per_s
    return best


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates of a draft. acceptance: see `expected_accepted`. level_cost: see `optimal_tree`.

    Raises ValueError for invalid acceptance rates or a negative cost.
    """

    acceptance: tuple[tuple[float, ...], ...]
    level_cost: float = 0.1

    def __post_init__(self) -> None:
        _check_acceptance(self.acceptance, 1)
        if self.level_cost < 0:
            raise ValueError(f"level_cost={self.level_cost} must be at least 0")

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Read a JSON object with these two fields. Raises ValueError for anything else."""

        def make(content: Any) -> Rates:
            levels = fields(content)["acceptance"]
            if not isinstance(levels, list):
                raise ValueError("acceptance must be a list of levels")
            acceptance = tuple(probabilities(level, "each level of acceptance") for level in levels)
            return cls(acceptance, finite_number(content["level_cost"], "level_cost"))

        return read_json(path, "acceptance must be a JSON object with acceptance and level_cost", make)


def _family(rates: Values, below: Values) -> tuple[Values, list[npt.NDArray[np.int64]]]:
    """Value of 0, 1, ... nodes in the subtrees of all children of a node, and the size of each rank's subtree.

    below: value of 0, 1, ... descendants of one child.
    """
    size = len(below)
    values, sizes = np.zeros(size), []
    for rate in rates[::-1]:  # last rank first: values cover this rank and later ones
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
    """The paths of the best `number` descendants of a node."""
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
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes={num_nodes} must lie in [1, {MAX_NODES}]")
    if not 1 <= len(acceptance) <= MAX_LEVELS:
        raise ValueError(f"acceptance of {len(acceptance)} levels must have 1 to {MAX_LEVELS} levels")
    for depth, rates in enumerate(acceptance):
        if not all(0 <= rate <= 1 for rate in rates) or sum(rates) > 1 + 1e-9:
            raise ValueError(
                f"acceptance[{depth}]={list(rates)} must be probabilities that sum to at most 1: at most one sibling "
                "is accepted"
            )
    if not acceptance[0] or acceptance[0][0] <= 0:
        raise ValueError("acceptance[0][0] must be above 0: otherwise no tree has an accepted token")


# without measurements: each sibling is accepted half as often as the previous one, on all levels alike
USUAL_RATES = Rates(((0.5, 0.16, 0.08, 0.04, 0.02, 0.01),) * 8)
