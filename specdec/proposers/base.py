"""The protocol of a proposer, which drafts tokens for verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from specdec.device_rows import RowState
from specdec.models.base import FeatureLayers
from specdec.requests import Batch, Generation
from specdec.sampling.distributions import Distribution
from specdec.sampling.state import RowParams
from specdec.trees.shape import Tree
from specdec.verification import Draft


class Proposer(Protocol):
    """Proposes a continuation for every row of a batch.

    A proposer keeps itself in step by looking at `row.tokens`, which holds committed tokens only: what was rejected
    is not there, and a slot that was given to another request holds another `Generation`.
    feature_layers: which of the target's hidden states it reads from `batch.features`, see `models.base.FeatureLayers`.
    A subclass inherits the defaults here: no features, and nothing is kept of finished requests.
    """

    feature_layers: FeatureLayers = ()

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """A draft with at most limits[r] tokens in row r, and none in an idle row.

        The draft's distribution must be the distribution that its tokens were drawn from.
        """
        ...

    def forget(self) -> None:
        """Drop the state of finished requests."""
        return


@runtime_checkable
class CopyingProposer(Proposer, Protocol):
    """A proposer that copies tokens: the host knows them, and uploads them with the rest of a recorded step's input."""

    def guess(self, batch: Batch, limits: Sequence[int]) -> list[list[int]]:
        """The tokens to copy in each row, at most limits[r]; an empty list for none."""
        ...

    def complete(self, batch: Batch, limits: Sequence[int], guesses: Sequence[Sequence[int]]) -> Draft | None:
        """The draft of these guesses and of what is drawn in rows without one; None if nothing is drawn."""
        return None


@runtime_checkable
class FixedProposer(Proposer, Protocol):
    """A proposer with drafts that can be pure functions of tensors, so that whole decode steps can be recorded.

    is_fixed: whether they are in this configuration. context_length: rows with more tokens get no draft.
    tree: the shape of its drafts; None for chains.
    """

    tree: Tree | None = None

    @property
    def is_fixed(self) -> bool: ...

    @property
    def context_length(self) -> int: ...

    def enter(self, batch: Batch, slot: int) -> list[int]:
        """Prepare the cache for the row in a busy slot; returns the tokens that it lacks, `RowState.pending`.

        Later drafts of the row are reported only by `drafted`.
        """
        ...

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        """Further inputs of `draft_from`, as arguments of a recorded function."""
        ...

    def draft_from(
        self, state: RowState, rows: RowParams, num_tokens: int, extent: int, *inputs: Any
    ) -> tuple[Tensor, Distribution, Tensor]:
        """Draft num_tokens, or the tree, for each row, as a pure function of tensors; see
        `specdec.proposers.chain.draw_fixed` and `specdec.proposers.tree.draw_fixed_tree`.

        extent: an upper bound on the tokens of a row with its draft. inputs: from `inputs`.
        """
        ...

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        """Number of each row's newest tokens that the cache lacks after verification of a draft of num_tokens.

        accepted: int64 [rows]. A pure function of tensors.
        """
        ...

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        """Record that a draft was made for the row in a slot when the row had `length` tokens."""
        ...
