"""W1 to W3, bugs of sliding windows, S1 to S4, bugs of recurrent states, and R1, a bug of routing to experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.conformance.mutants.planting import BrokenLoop, Plant, maker
from specdec.conformance.mutants.proposals import prompt_lookup
from specdec.models.causal import CausalLM
from specdec.models.state.recurrent import StateRing
from specdec.models.state.windows import LocalAttention
from specdec.requests import Batch
from specdec.verification import Draft


class FewColumns(LocalAttention):
    """A ring of just the window: draft tokens overwrite what is attended to after their rejection."""

    def num_columns(self, capacity: int) -> int:
        return min(capacity, self.size)

    def reaches(self, num_tokens: int, num_written: int, capacity: int) -> bool:
        return True


class BySlot(LocalAttention):
    """Takes columns for positions, which is right until the ring is overwritten."""

    def places(self, ends: Tensor, capacity: int, extent: int) -> Tensor:
        return torch.arange(extent, device=ends.device).expand(len(ends), -1)


def with_window(broken: Callable[[LocalAttention], LocalAttention]) -> Callable[[Any], Any]:
    """Replace the local attention of each layer of a CausalLM that has one."""

    def break_target(target: Any) -> Any:
        wrong = copy(target)
        wrong.local = tuple(local and broken(local) for local in target.local)
        return wrong

    return break_target


BROKEN_WINDOWS: dict[str, Callable[[LocalAttention], LocalAttention]] = {
    "W1 ring overwritten before the rollback": lambda local: FewColumns(local.size, local.is_chunked),
    "W2 window by slot": lambda local: BySlot(local.size, local.is_chunked),
    "W3 window too long": lambda local: replace(local, size=local.size + 1),
    "W3 window too short": lambda local: replace(local, size=local.size - 1),
}

WINDOW_MUTANTS: dict[str, Plant] = {
    name: partial(maker, break_target=with_window(broken)) for name, broken in BROKEN_WINDOWS.items()
}


class StaleState(StateRing):
    """S1: after a rejection, continues from the state after the last token that was fed."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [max(self.lengths(slot)) if length else 0 for slot, length in pairs])

    def truncate(self, slot: int, length: int) -> None:
        if length == 0:
            super().truncate(slot, length)


class StateOfPreviousToken(StateRing):
    """S2: continues from the state before the last accepted token, where it is kept."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [length - (length - 1 in self.lengths(slot)) for slot, length in pairs])


class ShiftedState(StateRing):
    """S3: the columns of a convolution's inputs are off by one."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        states = super().read(first_slot, lengths)
        return None if states is None else states.roll(1, -1)


class KeptState(StateRing):
    """S4: a slot given to another sequence keeps the state of the one before."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [length or max(self.lengths(slot), default=0) for slot, length in pairs])

    def truncate(self, slot: int, length: int) -> None:
        if length:
            super().truncate(slot, length)


def with_rings(ring: type[StateRing], kinds: Sequence[str] = ("conv", "recurrent")) -> Callable[[CausalLM], Any]:
    """Replace the rings of these kinds of states in the caches of a model with recurrent layers."""

    def broken(model: CausalLM) -> CausalLM:
        def allocate(num_slots: int, capacity: int, **options: Any) -> Any:
            cache: Any = model.allocate(num_slots, capacity, **options)
            depth = options["max_rollback"] + 1
            cache.new_ring = lambda kind: (ring if kind in kinds else StateRing)(num_slots, depth)
            return cache

        twin = copy(model)
        twin.allocate = allocate  # type: ignore[method-assign]
        return twin

    return broken


STATE_MUTANTS: dict[str, Plant] = {  # of targets with recurrent layers
    "S1 stale state": partial(maker, break_target=with_rings(StaleState)),
    "S2 state of the previous token": partial(maker, break_target=with_rings(StateOfPreviousToken)),
    "S3 convolution off by one": partial(maker, break_target=with_rings(ShiftedState, ("conv",))),
    "S4 refilled slot keeps its state": partial(maker, break_target=with_rings(KeptState)),
}


class RoutesPadding(BrokenLoop):
    """R1: the router reads the padding after short drafts, but the experts' tokens are counted without it.

    So every token after padding gets the experts of another one. Batches whose drafts have equal lengths are right.
    """

    def __init__(self, target: Any, *args: Any, **options: Any) -> None:
        super().__init__(target, *args, **options)
        self._is_token: Tensor | None = None
        for name, module in target.model.named_modules():
            if name.endswith(".gate"):
                module.register_forward_hook(self._shift)

    def _score(self, batch: Batch, draft: Draft, cache: Any) -> Tensor:
        columns = torch.arange(draft.tokens.shape[1] + 1, device=draft.num_proposed.device)
        self._is_token = (columns <= draft.num_proposed.unsqueeze(1)).flatten()
        logits = super()._score(batch, draft, cache)
        self._is_token = None
        return logits

    def _shift(self, module: Any, args: Any, choices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Let the choices for the first n rows be those for the n tokens. choices: [rows * width, ...] each."""
        if self._is_token is None:
            return choices
        shifted = tuple(each.clone() for each in choices)
        for right, wrong in zip(choices, shifted, strict=True):
            wrong[self._is_token] = right[: int(self._is_token.sum())]
        return shifted


ROUTER_MUTANTS: dict[str, Plant] = {  # of targets with experts, drafted for by prompt lookup
    "R1 router fed with padding": partial(maker, proposer=prompt_lookup, decoder=RoutesPadding),
}
