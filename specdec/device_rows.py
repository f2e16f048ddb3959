"""What a decode step must know of its rows, kept on the device: the next step begins before the host has read this one.

A step that is recorded as a whole takes this state and leaves the next one in its place. The host uploads rows only
where a slot changes hands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.requests import Generation
from specdec.runtime.devices import upload
from specdec.runtime.recording import InPlace

_IDLE_LENGTH = 2  # tokens declared for an idle slot, so that the place before the newest is still >= 0


@dataclass(frozen=True, slots=True)
class RowState:
    """The rows of a batch before a step, all int64.

    num_tokens: [rows], tokens so far, so also the position where the next draft begins.
    remaining: [rows], tokens that may still be emitted; 0 for an idle slot, whose state then stays as it is.
    pending: [rows, n], the newest tokens, of which the first num_pending [rows] are real, at least one, and the others
    padding. The last of them is the row's newest, and all are what the draft's cache lacks.
    """

    num_tokens: Tensor
    remaining: Tensor
    num_pending: Tensor
    pending: Tensor

    @classmethod
    def unpack(cls, packed: Tensor) -> RowState:
        """The state in a tensor int64 [rows, 3 + n]."""
        return cls(packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3:])

    def packed(self) -> Tensor:
        """As one tensor, int64 [rows, 3 + n]."""
        return torch.cat([torch.stack([self.num_tokens, self.remaining, self.num_pending], 1), self.pending], 1)

    @property
    def newest(self) -> Tensor:
        """The last token of each row, int64 [rows, 1]."""
        if self.pending.shape[1] == 1:
            return self.pending
        return self.pending.gather(1, self.num_pending.unsqueeze(1) - 1)

    def limits(self, max_tokens: int, context_length: int) -> Tensor:
        """Tokens that each row may draft, int64 [rows]: as many as could be emitted before the step's last token.

        max_tokens: upper limit. context_length: tokens that the draft model takes.
        """
        return torch.minimum(self.remaining - 1, context_length - self.num_tokens).clamp(min=0, max=max_tokens)

    def after(self, drafted: Tensor, accepted: Tensor, next_token: Tensor, num_pending: Tensor) -> RowState:
        """The state after a step that emitted accepted[r] of the drafted tokens, int64 [rows, n - 1], and one more.

        num_pending: int64 [rows], how many of these the draft's cache then lacks.
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
    """The packed `RowState` of all slots at a fixed place on the device, and whose state that is.

    num_slots: rows. num_pending: maximum of tokens that a row may have pending.
    """

    def __init__(self, num_slots: int, num_pending: int, device: torch.device) -> None:
        with torch.inference_mode():
            self._state = InPlace(torch.zeros(num_slots, 3 + num_pending, dtype=torch.int64, device=device))
        self._owners: dict[int, Generation | None] = {}

    def forget(self) -> None:
        """The rows go on without this state, and are entered anew when it is needed again."""
        self._owners.clear()

    @torch.inference_mode()
    def enter(self, rows: Sequence[Generation | None], pending: Callable[[int], list[int]]) -> InPlace[Tensor]:
        """The state of these rows, of which those that it does not have yet are uploaded, all at once.

        pending: of a busy slot that is entered, the newest tokens that the draft's cache lacks, at least one.
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
        """A one, and the row's state."""
        tokens = pending(slot) if row else [0]
        length, remaining = (len(row.tokens), row.num_remaining) if row else (_IDLE_LENGTH, 0)
        padding = [0] * (self._state.value.shape[1] - 3 - len(tokens))
        return [1, length, remaining, len(tokens), *tokens, *padding]
