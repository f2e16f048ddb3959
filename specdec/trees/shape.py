"""Token trees: the shapes of drafts that propose several continuations at once, and a tree's columns in a model's call.

How they are verified is in `specdec.trees.verification`, which tree is best in `specdec.trees.optimal`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.runtime.checks import require
from specdec.runtime.json_files import integers, read_json

MAX_NODES = 512
MAX_LEVELS = 24
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
            if len(paths) + len(level) * width > MAX_NODES:
                raise ValueError(f"widths={list(widths)} must give at most {MAX_NODES} nodes; make levels narrower")
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return cls(tuple(paths))

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

        def make(content: Any) -> Tree:
            paths = content["paths"] if isinstance(content, dict) else content
            if not isinstance(paths, list):
                raise ValueError(f"a {type(paths).__name__} is no list of paths")
            return cls(tuple(tuple(integers(each, "a path")) for each in paths))

        return read_json(path, "tree must be a JSON file with rank paths such as [[0], [1], [0, 0]]", make)


def as_tree(tree: Tree | Iterable[Sequence[int]] | str | Path) -> Tree:
    """A tree from itself, from rank paths or from a file."""
    if isinstance(tree, Tree):
        return tree
    return Tree.load(Path(tree)) if isinstance(tree, str | Path) else Tree(tuple(map(tuple, tree)))


def _checked(paths: Iterable[Sequence[int]]) -> list[RankPath]:
    known = set()
    checked = []
    for path in map(tuple, paths):
        require(len(path) > 0, "tree path () must have a rank; the root is the text and no node of its own")
        require(all(isinstance(rank, int) and rank >= 0 for rank in path), f"tree path {path} must hold ranks >= 0")
        require(path not in known, f"tree path {path} must be given once, not twice")
        known.add(path)
        checked.append(path)
    require(0 < len(known) <= MAX_NODES, f"a tree of {len(known)} nodes must have from 1 to {MAX_NODES}")
    depth = max(map(len, known))
    require(depth <= MAX_LEVELS, f"a tree of {depth} levels must have at most {MAX_LEVELS}")
    for path in checked:
        parent, rank = path[:-1], path[-1]
        require(not parent or parent in known, f"tree path {path} must have its parent {parent} in the tree; add it")
        require(
            rank == 0 or (*parent, rank - 1) in known,
            f"tree path {path} leaves a gap: rank {rank - 1} must be in the tree before rank {rank}; add "
            f"{(*parent, rank - 1)}",
        )
    return checked


def _lineage_mask(parents: Sequence[int]) -> list[list[bool]]:
    """For each column which columns stand before it, or are it."""
    rows: list[list[bool]] = []
    for number, parent in enumerate(parents):
        row = list(rows[parent]) if parent >= 0 else [False] * len(parents)
        row[number] = True
        rows.append(row)
    return rows


# ---- a tree's columns in a model's call
