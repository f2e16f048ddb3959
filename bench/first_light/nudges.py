"""Is a uniform at a boundary? Decoding again with uniforms that are moved a little tells.

Two devices round differently, so a token whose uniform lies next to a boundary of the cumulative distribution, or of an
acceptance test, may be another one. Everything else is a fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec import Engine
from specdec.sampling import randomness
from specdec.sampling.distributions import race
from specdec.sampling.randomness import Role, off_branch, uniforms

LAST = (Role.RECOVER, Role.BONUS)  # what draws the last token of a step
_LARGEST = 1 - 2.0**-53  # the largest uniform there is


@dataclass(frozen=True, slots=True)
class Nudge:
    """Moves the uniforms of some roles by `shift`, at a position of the text and behind it."""

    position: int
    roles: tuple[Role, ...]
    shift: float

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        drawn = uniforms(seeds, positions, roles, origins)
        is_of_kind = torch.isin(off_branch(roles)[0], torch.tensor(self.roles))
        return torch.where((positions >= self.position) & is_of_kind, (drawn + self.shift).clamp(0.0, _LARGEST), drawn)


def nudge(engine: Engine, source: Nudge) -> None:
    """Let an engine on a CPU that records nothing draw by a source, its proposer and what that consists of too."""
    decoder = engine._decoder
    decoder.uniforms = source
    waiting: list[Any] = [decoder.proposer] if decoder.proposer else []
    while waiting:
        each = waiting.pop()
        if hasattr(each, "_uniforms"):
            each._uniforms = source
        waiting += [part for part in vars(each).values() if hasattr(part, "propose")]


def wins_nearby(ours: int, theirs: int, here: Tensor, there: Tensor, seed: int, position: int, spread: float) -> bool:
    """Whether a token may win another's race by rounding, the other one having won it on the CPU.

    here, there: float32 [vocab], the distributions of the CPU and of a device. spread: of their logarithms.
    It may if it wins by the device's distribution, or if the waiting times differ by less than the spread allows.
    """
    noise = randomness.noise(torch.tensor([seed]), torch.tensor([[position]]), len(here))[0, 0]
    if int(race(there, noise)) == ours:
        return True
    waits = -torch.log1p(-noise) / here.double()
    return bool((waits[ours].log() - waits[theirs].log()).abs() <= 2 * spread)
