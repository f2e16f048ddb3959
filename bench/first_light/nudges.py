"""Tests whether rounding explains a token that differs between devices, by decoding again with shifted uniforms.

Two devices round differently, so they may choose different tokens where a uniform lies next to a boundary of the
cumulative distribution or of an acceptance test. Any other difference is an error.
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

LAST = (Role.RECOVER, Role.BONUS)  # the roles that draw the last token of a step
_LARGEST = 1 - 2.0**-53  # the largest possible uniform


@dataclass(frozen=True, slots=True)
class Nudge:
    """A source of uniforms that shifts those of some roles by `shift`, from a position of the sequence on."""

    position: int
    roles: tuple[Role, ...]
    shift: float

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        drawn = uniforms(seeds, positions, roles, origins)
        has_role = torch.isin(off_branch(roles)[0], torch.tensor(self.roles))
        return torch.where((positions >= self.position) & has_role, (drawn + self.shift).clamp(0.0, _LARGEST), drawn)


def nudge(engine: Engine, source: Nudge) -> None:
    """Make an engine on a CPU, its proposer and nested proposers draw from `source`. The engine must not record."""
    decoder = engine._decoder
    decoder.uniforms = source
    waiting: list[Any] = [decoder.proposer] if decoder.proposer else []
    while waiting:
        proposer = waiting.pop()
        if hasattr(proposer, "_uniforms"):
            proposer._uniforms = source
        waiting += [part for part in vars(proposer).values() if hasattr(part, "propose")]


def wins_nearby(
    token: int, cpu_token: int, cpu_probs: Tensor, device_probs: Tensor, seed: int, position: int, spread: float
) -> bool:
    """Whether rounding can make a token win the race that another token won on the CPU.

    cpu_probs, device_probs: float32 [vocab]. spread: the largest difference of their logarithms.
    It can if the token wins with the device's distribution, or if the waiting times of the two tokens differ by less
    than the spread allows.
    """
    noise = randomness.noise(torch.tensor([seed]), torch.tensor([[position]]), len(cpu_probs))[0, 0]
    if int(race(device_probs, noise)) == token:
        return True
    waits = -torch.log1p(-noise) / cpu_probs.double()
    return bool((waits[token].log() - waits[cpu_token].log()).abs() <= 2 * spread)
