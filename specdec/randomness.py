"""Counter-based uniforms: a pure function of (request seed, position, role, origin).

The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"),
the one behind cuRAND and numpy.random.Philox. It has no state, so a row's draws do not depend on its batch mates,
on the device or on the order of work.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


class Role(IntEnum):
    """What a uniform decides. Two roles never share a draw."""

    DRAFT = 0
    ACCEPT = 1
    RECOVER = 2
    BONUS = 3


class UniformSource(Protocol):
    """Anything that hands out uniforms as `uniforms` does; tests enumerate them."""

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor: ...


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: four counter words and two key words -> four random words.

    Every word is an int64 tensor holding an unsigned 32-bit value; shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # an int64 product wraps, but its bits are those of the unsigned product
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (high >> 32 & _MASK) ^ c1 ^ k0, high & _MASK,
            (low >> 32 & _MASK) ^ c3 ^ k1, low & _MASK,
        )
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 53 random bits.

    seeds: int64, the request's seed as 64 bits. positions: int64 >= 0, index of the token that the draw decides about.
    roles: int64, a Role. origins: int64 >= 0, position where the current draft began: a position that was drafted,
    thrown away and drafted again must not meet the same draw twice.
    Shapes broadcast; returns float64 of the broadcast shape.
    """
    word0, word1, _, _ = philox(
        (positions & _MASK, origins & _MASK, roles & _MASK, torch.zeros_like(roles)),
        (seeds & _MASK, seeds >> 32 & _MASK),
    )
    bits = (word0 >> 5 << 26) + (word1 >> 6)
    return bits.double() * 2.0**-53
