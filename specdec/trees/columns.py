"""Tree attention: which cache columns the nodes of a draft tree attend to, and their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from specdec.trees.shape import Tree, _lineage_mask


@dataclass(frozen=True, slots=True)
class Branches:
    """The tree columns after a cache's valid tokens. Each attends to the valid tokens, its ancestors and itself.

    parents: for each column its parent column, -1 for the last valid token; parents precede their children.
    first: the first column fed by this call; those before it were fed by earlier calls.
    """

    parents: tuple[int, ...]
    first: int = 0

    @classmethod
    def after_root(cls, parents: Sequence[int]) -> Branches:
        """The columns of a target call: the newest token of the text followed by the nodes of a tree."""
        return cls((-1, *(parent + 1 for parent in parents)))

    @property
    def width(self) -> int:
        """Number of columns that the call feeds."""
        return len(self.parents) - self.first


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def offsets(branches: Branches, device: torch.device) -> Tensor:
    """Position of each fed column relative to the first position after the valid tokens: int64 [width]."""
    depths: list[int] = []
    for parent in branches.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return torch.tensor(depths[branches.first :], device=device)


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def nodes_within(tree: Tree, device: torch.device) -> Tensor:
    """Number of nodes in a tree's first 0, 1, ... levels: int64 [depth + 1]."""
    return torch.tensor([tree.num_within(depth) for depth in range(tree.depth + 1)], device=device)


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def visible(branches: Branches, device: torch.device) -> Tensor:
    """Attention mask of the fed columns over all columns: bool [width, columns]."""
    return torch.tensor(_lineage_mask(branches.parents)[branches.first :], dtype=torch.bool, device=device)


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def tree_paths(branches: Branches, device: torch.device) -> Tensor:
    """The columns on the path to each fed column, itself last and repeated as padding: int64 [width, depth]."""
    paths = [[i for i, sees in enumerate(row) if sees] for row in _lineage_mask(branches.parents)[branches.first :]]
    depth = max(map(len, paths))
    return torch.tensor([[*path, *[path[-1]] * (depth - len(path))] for path in paths], device=device)
