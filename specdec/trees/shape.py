"""Token trees: the shape of drafts that propose several continuations at once.

See `specdec.trees.verification` for their verification and `specdec.trees.optimal` for the optimal tree.
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

from specdec.runtime.json_files import integers, read_json

MAX_NODES = 512
MAX_LEVELS = 24
RankPath = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """The shape of a draft tree: its nodes as rank paths, in the notation of Medusa and EAGLE.

    paths: (0,) is the first choice after the text, (1,) the second, (0, 2) the third choice after the first. They may
    be given in any order and are sorted level by level, siblings adjacent.
    parents: each node's parent, -1 for the root (the text). families: the nodes with children, in order, -1 for the
    root. widths: number of nodes of each level.
    Raises ValueError for a node without its parent, a duplicate node, a missing lower rank, an empty path, an empty
    tree, or more than 512 nodes or 24 levels.
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
        """A tree with a single path."""
        return cls.balanced([1] * num_tokens)

    @classmethod
    def balanced(cls, widths: Sequence[int]) -> Tree:
        """A tree in which every node of level i has widths[i] children. Raises ValueError for a width below 1."""
        if any(width < 1 for width in widths):
            raise ValueError(f"widths={list(widths)} must be at least 1 on each level; leave out empty levels")
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
        """Number of levels, the maximum number of accepted tokens."""
        return len(self.widths)

    @property
    def depths(self) -> tuple[int, ...]:
        """Level of each node, starting at 1."""
        return tuple(map(len, self.paths))

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each node among its siblings."""
        return tuple(path[-1] for path in self.paths)

    @property
    def ancestors(self) -> Tensor:
        """Which nodes are ancestors of a node or the node itself: bool [nodes, nodes], one row per node."""
        return torch.tensor(_lineage_mask(self.parents), dtype=torch.bool).view(len(self), len(self))

    def lineage(self, node: int) -> list[int]:
        """The nodes on the path to a node, from the first level to the node itself; () for the root, -1."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def num_within(self, depth: int) -> int:
        """Number of nodes in the first `depth` levels; they precede all others."""
        return sum(self.widths[: max(depth, 0)])

    def cut(self, depth: int) -> Tree:
        """The tree cut to its first `depth` levels."""
        return self if depth >= self.depth else Tree(self.paths[: self.num_within(depth)])

    def num_children(self, node: int, num_nodes: int | None = None) -> int:
        """Number of children of a node, -1 for the root, among the first num_nodes nodes."""
        return self.parents[:num_nodes].count(node)

    def save(self, path: Path, **about: Any) -> None:
        """Write JSON for `load`. about: further entries, such as where the tree comes from."""
        path.write_text(json.dumps({"paths": self.paths, **about}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Tree:
        """Read a tree from JSON: an object with `paths`, or a list of paths. Raises ValueError for anything else."""

        def make(content: Any) -> Tree:
            paths = content["paths"] if isinstance(content, dict) else content
            if not isinstance(paths, list):
                raise ValueError(f"a {type(paths).__name__} is not a list of paths")
            return cls(tuple(tuple(integers(each, "a path")) for each in paths))

        return read_json(path, "tree must be a JSON file of rank paths such as [[0], [1], [0, 0]]", make)


def as_tree(tree: Tree | Iterable[Sequence[int]] | str | Path) -> Tree:
    """A tree from a tree, from rank paths or from a file."""
    if isinstance(tree, Tree):
        return tree
    if isinstance(tree, str | Path):
        return Tree.load(Path(tree))
    paths = list(tree) if isinstance(tree, Iterable) else [None]
    if not all(isinstance(path, Iterable) for path in paths):
        raise ValueError(f"tree={tree!r} must be a Tree, rank paths such as [(0,), (1,), (0, 0)], or a JSON file")
    return Tree(tuple(map(tuple, paths)))


def _checked(paths: Iterable[Sequence[int]]) -> list[RankPath]:
    known = set()
    checked = []
    for path in map(tuple, paths):
        if not path:
            raise ValueError("tree path () must have a rank; the root is the text, not a node")
        if not all(isinstance(rank, int) and rank >= 0 for rank in path):
            raise ValueError(f"tree path {path} must consist of ranks >= 0")
        if path in known:
            raise ValueError(f"tree path {path} must occur only once")
        known.add(path)
        checked.append(path)
    if not 0 < len(known) <= MAX_NODES:
        raise ValueError(f"tree of {len(known)} nodes must have 1 to {MAX_NODES} nodes")
    depth = max(map(len, known))
    if depth > MAX_LEVELS:
        raise ValueError(f"tree of {depth} levels must have at most {MAX_LEVELS} levels")
    for path in checked:
        parent, rank = path[:-1], path[-1]
        if parent and parent not in known:
            raise ValueError(f"tree path {path} must have its parent {parent} in the tree; add it")
        if rank > 0 and (*parent, rank - 1) not in known:
            raise ValueError(f"tree path {path} must have its lower rank {(*parent, rank - 1)} in the tree; add it")
    return checked


def _lineage_mask(parents: Sequence[int]) -> list[list[bool]]:
    """For each column, which columns are its ancestors or itself."""
    rows: list[list[bool]] = []
    for number, parent in enumerate(parents):
        row = list(rows[parent]) if parent >= 0 else [False] * len(parents)
        row[number] = True
        rows.append(row)
    return rows
