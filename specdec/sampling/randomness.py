"""Counter-based uniforms: a pure function of (request seed, position, role, origin).

The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"),
the one behind cuRAND and numpy.random.Philox. It has no state, so a row's draws do not depend on its batch mates,
on the device or on the order of work.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.kernels import cpp, gpu

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
    COUPLED = 4


_BRANCH_SHIFT = 8  # the role takes the low bits of its word of the counter, the branch those above


def on_branch(role: int | Tensor, branch: int | Tensor) -> Any:
    """A role's draws on a branch of a tree, which no two nodes of a level share: branch 0 is the role's own.

    branch: integer in [0, 2**24), a node's place in its level. Returns what stands for the role.
    """
    return role + (branch << _BRANCH_SHIFT)


def off_branch(role: int | Tensor) -> tuple[Any, Any]:
    """(role, branch) of what `on_branch` returned."""
    return role & (1 << _BRANCH_SHIFT) - 1, role >> _BRANCH_SHIFT


class UniformSource(Protocol):
    """Anything that hands out uniforms as `uniforms` does; tests enumerate them."""

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor: ...


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10: counter [4, ...] and key [2, ...] -> random words [4, ...].

    Every word is an int64 holding an unsigned 32-bit value; the axes behind the first broadcast.
    """
    multipliers, weyl = (words.view(2, *[1] * (counter.ndim - 1)) for words in _constants(counter.device))
    even, odd = counter[0::2], counter[1::2]  # a list of numbers would be uploaded
    for i in range(_ROUNDS):
        # an int64 product wraps, but its bits are those of the unsigned product
        product = (even * multipliers).flip(0)
        even = (product >> 32 & _MASK) ^ odd ^ (key + i * weyl & _MASK)
        odd = product & _MASK
    return torch.stack([even, odd], 1).flatten(0, 1)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(_WEYL, device=device)


def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 53 random bits.

    seeds: int64, the request's seed as 64 bits. positions: int64 >= 0, index of the token that the draw decides about.
    roles: int64, a Role, on a branch or not. origins: int64 >= 0, position where the current draft began: a position
    that was drafted, thrown away and drafted again must not meet the same draw twice. For COUPLED a token id stands in
    its place.
    Shapes broadcast; returns float64 of the broadcast shape.
    """
    if fast := gpu.for_gpu(seeds):
        drawn: Tensor = fast.uniforms(seeds, positions, roles, origins)
        return drawn
    if seeds.device.type == "cpu" and cpp.available(torch.float32):
        return cpp.uniforms(seeds, positions, roles, origins)
    words = torch.stack(torch.broadcast_tensors(positions, origins, roles, torch.zeros_like(roles), seeds))
    random = philox(words[:4] & _MASK, torch.stack([words[4], words[4] >> 32]) & _MASK)
    bits = (random[0] >> 5 << 26) + (random[1] >> 6)
    return bits.double() * 2.0**-53


def own_seed(seed: int, number: int) -> int:
    """A seed for a request that others came before, so many of them; the first keeps its own. Both in [0, 2**64).

    For requests whose drafts depend on what others said: an output tells of the uniforms that it was drawn by, and a
    request that met these uniforms again would not have the target's distribution.
    """
    return _derived(seed, number, 1)


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of several samples of a request; the first has the request's own. Both in [0, 2**64)."""
    return _derived(seed, sample, 2)


def _derived(seed: int, number: int, purpose: int) -> int:
    """Another seed for each number but 0 and each purpose > 0, which is 0 wherever uniforms are drawn."""
    if number == 0:
        return seed
    counter = torch.tensor([number & _MASK, number >> 32, 0, purpose])
    low, high = philox(counter, torch.tensor([seed & _MASK, seed >> 32]))[:2].tolist()
    return int(high) << 32 | int(low)


def noise(seeds: Tensor, positions: Tensor, vocab_size: int, source: UniformSource = uniforms) -> Tensor:
    """One uniform for each token at each position: the same for whoever draws there, draft or target.

    seeds: int64 [rows]. positions: int64 [rows, n]. Returns float64 [rows, n, vocab].
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    role = torch.full_like(tokens[:1], Role.COUPLED)
    if gpu.for_gpu(positions):
        return source(seeds.view(-1, 1, 1), positions.unsqueeze(2), role, tokens)
    # one position at a time: without kernels Philox needs many times the memory of what it returns
    drawn = [source(seeds.unsqueeze(1), column.unsqueeze(1), role, tokens) for column in positions.unbind(1)]
    return torch.stack(drawn, 1)
