"""Local attention: sliding windows and chunks, kept in ring buffers of fixed size.

The keys and values of a local layer are stored in R columns. The token at place p is in column p mod R, so column c
holds the last place written before the end of a call, see `LocalAttention.places`. A query at position q of a layer
with window W attends to positions q - W + 1 to q. R is at least W - 1 plus the width of the widest call, so what a call
overwrites is outside the window of its first token and of all later ones: rejected draft tokens never replace what a
query after the rollback attends to.

A rollback is possible while the tokens in the window of the next query have not been overwritten, `reaches`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FEWEST_SPARE, _MOST_SPARE = 128, 512  # columns of a ring beyond its window


@dataclass(frozen=True, slots=True)
class LocalAttention:
    """Attention to the newest `size` positions, or if is_chunked to those of the query's own chunk of `size`.

    Chunks start at multiples of the size, as in Llama 4. In both cases a query attends to less than `size` tokens
    before it.
    """

    size: int
    is_chunked: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} of a window must be at least 1; correct sliding_window in the config")

    @property
    def num_spare(self) -> int:
        """Columns of the ring beyond the window: the widest call and, after narrower ones, the deepest rollback.

        A quarter of the window, for short windows more, so that a prompt is read in few calls.
        """
        return min(max(self.size // 4, _FEWEST_SPARE), _MOST_SPARE)

    def num_columns(self, capacity: int) -> int:
        """Columns for sequences of up to `capacity` tokens; as many as tokens if these fit without overwriting."""
        return min(capacity, self.size + self.num_spare)

    def reaches(self, num_tokens: int, num_written: int, capacity: int) -> bool:
        """Whether the cache still holds what a query after num_tokens tokens attends to.

        num_written: one more than the last place written since the slot was emptied.
        """
        first_attended = max(0, num_tokens - self.size + 1)
        return num_tokens == 0 or num_written - self.num_columns(capacity) <= first_attended

    def places(self, ends: Tensor, capacity: int, extent: int) -> Tensor:
        """The last place before each row's end that each column of a ring stores; negative where none was written.

        ends: int64 [rows]. Returns int64 [rows, extent] for the first `extent` columns.
        """
        last = ends.unsqueeze(1) - 1
        return last - (last - torch.arange(extent, device=ends.device)).remainder(self.num_columns(capacity))

    def hides(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether a query does not attend to a key that is not after it: bool, from int64 positions that broadcast."""
        if self.is_chunked:
            return keys.div(self.size, rounding_mode="floor") != queries.div(self.size, rounding_mode="floor")
        return keys <= queries - self.size
