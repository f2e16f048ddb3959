"""Row state on the device, so that a decode step can start before the host has read the outcome of the previous one.

A fully recorded step updates this state in place. The host uploads a row only when its slot is reassigned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.requests import Generation
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace

_IDLE_LENGTH = 2  # length of an idle slot, such that positions before the last token are >= 0


@dataclass(frozen=True, slots=True)
class RowState:
    """The rows of a batch before a step, all int64.

    num_tokens: [rows], number of tokens, which is also the position of the next draft.
    remaining: [rows], tokens that may still be emitted; 0 for an idle slot, whose state then does not change.
    pending: [rows, n], the newest tokens, which are missing in the draft's cache; the first num_pending >= 1 of them
    are real, ending with the row's last token, and the rest is padding.
    """

    num_tokens: Tensor
    remaining: Tensor
    num_pending: Tensor
    pending: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> RowState:
        """Unpack the state from a tensor int64 [rows, 3 + n]."""
        return cls(packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3:])

    def packed(self) -> Tensor:
        """Pack the state into one tensor, int64 [rows, 3 + n]."""
        return torch.cat([torch.stack([self.num_tokens, self.remaining, self.num_pending], 1), self.pending], 1)

    @property
    def newest(self) -> Tensor:
        """The last token of each row, int64 [rows, 1]."""
        if self.pending.shape[1] == 1:
            return self.pending
        return self.pending.gather(1, self.num_pending.unsqueeze(1) - 1)

    def limits(self, max_tokens: int, context_length: int) -> Tensor:
        """Maximum draft length of each row, int64 [rows]: a step emits one more token than it accepts.

        max_tokens: upper limit. context_length: of the draft model.
        """
        return torch.minimum(self.remaining - 1, context_length - self.num_tokens).clamp(min=0, max=max_tokens)

    def after(self, drafted: Tensor, accepted: Tensor, next_token: Tensor, num_pending: Tensor) -> RowState:
        """The state after a step that emitted accepted[r] of the drafted tokens, int64 [rows, n - 1], and one more.

        num_pending: int64 [rows], number of these tokens missing in the draft's cache.
        """
        advance = (accepted + 1) * (self.remaining > 0)
        num_tokens, remaining = self.num_tokens + advance, self.remaining - advance
        if drafted.shape[1] == 0:
            return RowState(num_tokens, remaining, num_pending, next_token.unsqueeze(1))
        emitted = torch.nn.functional.pad(drafted, (0, 1)).scatter(1, accepted.unsqueeze(1), next_token.unsqueeze(1))
        columns = torch.arange(emitted.shape[1], device=emitted.device)
        places = (accepted + 1 - num_pending).unsqueeze(1) + columns
        return RowState(num_tokens, remaining, num_pending, emitted.gather(1, places.clamp(max=drafted.shape[1])))


class DeviceRows:
    """The packed `RowState` of all slots at a fixed address on the device, and the rows that own them.

    num_slots: rows. num_pending: maximum number of pending tokens per row.
    """

    def __init__(self, num_slots: int, num_pending: int, device: torch.device) -> None:
        with torch.inference_mode():
            self._state = InPlace(torch.zeros(num_slots, 3 + num_pending, dtype=torch.int64, device=device))
        self._owners: dict[int, Generation | None] = {}

    def forget(self) -> None:
        """Invalidate the state, because rows will advance without it; they are uploaded again when needed."""
        self._owners.clear()

    @torch.inference_mode()
    def enter(self, rows: Sequence[Generation | None], pending: Callable[[int], list[int]]) -> InPlace[Tensor]:
        """The state of these rows; uploads the new ones in one transfer.

        pending: returns the tokens missing in the draft's cache, at least one, for a new busy slot.
        """
        new = {slot for slot, row in enumerate(rows) if slot not in self._owners or self._owners[slot] is not row}
        if new:
            state, unchanged = self._state.value, [0] * (1 + self._state.value.shape[1])
            entries = [self._entry(row, slot, pending) if slot in new else unchanged for slot, row in enumerate(rows)]
            update = upload(entries, state.device)
            state.copy_(torch.where(update[:, :1] > 0, update[:, 1:], state))
            self._owners = dict(enumerate(rows))
        return self._state

    def _entry(self, row: Generation | None, slot: int, pending: Callable[[int], list[int]]) -> list[int]:
        """The row's state, preceded by 1 to mark it as new."""
        tokens = pending(slot) if row else [0]
        length, remaining = (len(row.tokens), row.num_remaining) if row else (_IDLE_LENGTH, 0)
        padding = [0] * (self._state.value.shape[1] - 3 - len(tokens))
        return [1, length, remaining, len(tokens), *tokens, *padding]
