"""The columns of a draft tree behind the cache: which see which, and their positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from specdec.trees.shape import _lineage_mask


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


@cache  # without a limit: recordings read these tensors where they are
def offsets(branches: Branches, device: torch.device) -> Tensor:
    """How far each fed column's position is behind the first one's that follows the valid tokens: int64 [width]."""
    depths: list[int] = []
    for parent in branches.parents:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return torch.tensor(depths[branches.first :], device=device)


@cache  # without a limit: recordings read these tensors where they are
def visible(branches: Branches, device: torch.device) -> Tensor:
    """Which of all columns each fed column sees: bool [width, columns]."""
    return torch.tensor(_lineage_mask(branches.parents)[branches.first :], dtype=torch.bool, device=device)


@cache  # without a limit: recordings read these tensors where they are
def ways(branches: Branches, device: torch.device) -> Tensor:
    """The columns on the way to each fed column, itself last, by position: int64 [width, most positions]."""
    lines = [[i for i, sees in enumerate(row) if sees] for row in _lineage_mask(branches.parents)[branches.first :]]
    most = max(map(len, lines))
    return torch.tensor([[*line, *[line[-1]] * (most - len(line))] for line in lines], device=device)
