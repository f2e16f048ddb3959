"""The seam to whatever proposes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.requests import Batch
from specdec.verification import Draft


class Proposer(Protocol):
    """Proposes a continuation for every row of a batch.

    A proposer keeps itself in step by looking at `row.tokens`, which holds committed tokens only: what was rejected
    is not there, and a slot that was given to another request holds another `Generation`.
    One that has a true attribute `needs_features` finds the target's features in `batch.features`.
    """

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        """A draft with at most limits[r] tokens in row r, and none in an idle row.

        The draft's law must be the law that its tokens were drawn from.
        """
        ...
