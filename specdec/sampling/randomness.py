"""Counter-based uniforms: a pure function of (request seed, position, role, origin).

The generator is Philox 4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"),
as in cuRAND and numpy.random.Philox. It is stateless, so a row's draws do not depend on its batch mates, the device or
the order of work.
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
    """The purpose of a uniform. Two roles never share a draw."""

    DRAFT = 0
    ACCEPT = 1
    RECOVER = 2
    BONUS = 3
    COUPLED = 4


_BRANCH_SHIFT = 8  # the role takes the low bits of its counter word, the branch the bits above


def on_branch(role: int | Tensor, branch: int | Tensor) -> Any:
    """The role for draws on one branch of a tree, so that nodes of a level do not share uniforms.

    branch: integer in [0, 2**24), a node's index in its level; branch 0 is the plain role.
    """
    return role + (branch << _BRANCH_SHIFT)


def off_branch(role: int | Tensor) -> tuple[Any, Any]:
    """Inverse of `on_branch`: (role, branch)."""
    return role & (1 << _BRANCH_SHIFT) - 1, role >> _BRANCH_SHIFT


class UniformSource(Protocol):
    """A source of uniforms with the signature of `uniforms`; tests pass one that enumerates a grid."""

    def __call__(self, seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor: ...


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox 4x32-10: counter [4, ...] and key [2, ...] -> random words [4, ...].

    Words are int64 holding unsigned 32-bit values; all axes but the first broadcast.
    """
    multipliers, weyl = (words.view(2, *[1] * (counter.ndim - 1)) for words in _constants(counter.device))
    even, odd = counter[0::2], counter[1::2]  # slices, not index lists, which would be uploaded
    for i in range(_ROUNDS):
        # int64 products wrap but have the same bits as unsigned ones
        product = (even * multipliers).flip(0)
        even = (product >> 32 & _MASK) ^ odd ^ (key + i * weyl & _MASK)
        odd = product & _MASK
    return torch.stack([even, odd], 1).flatten(0, 1)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(_WEYL, device=device)


def uniforms(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 53 random bits.

    Args:
        seeds: int64, the 64 bits of each request's seed.
        positions: int64 >= 0, the index of the token that the draw decides.
        roles: int64, a `Role`, possibly with a branch.
        origins: int64 >= 0, the position where the current draft began, so that a position drafted again after a
            rejection gets a fresh uniform. For `Role.COUPLED` the token id.

    Returns:
        float64 of the broadcast shape of the arguments.
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
    """The seed, in [0, 2**64), of a request after `number` earlier requests; the first one keeps its seed.

    Needed when drafts depend on the outputs of earlier requests: an output reveals the random draws behind it, and
    reusing those draws would bias the result.
    """
    return _derived(seed, number, 1)


def sample_seed(seed: int, sample: int) -> int:
    """The seed, in [0, 2**64), of one of a request's n samples; sample 0 keeps the request's seed."""
    return _derived(seed, sample, 2)


def _derived(seed: int, number: int, purpose: int) -> int:
    """A distinct seed for each number > 0 and purpose > 0; `uniforms` draws with purpose 0."""
    if number == 0:
        return seed
    counter = torch.tensor([number & _MASK, number >> 32, 0, purpose])
    low, high = philox(counter, torch.tensor([seed & _MASK, seed >> 32]))[:2].tolist()
    return int(high) << 32 | int(low)


def noise(seeds: Tensor, positions: Tensor, vocab_size: int, source: UniformSource = uniforms) -> Tensor:
    """One uniform per token and position, shared by draft and target.

    seeds: int64 [rows]. positions: int64 [rows, n]. Returns float64 [rows, n, vocab].
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    role = torch.full_like(tokens[:1], Role.COUPLED)
    if gpu.for_gpu(positions):
        return source(seeds.view(-1, 1, 1), positions.unsqueeze(2), role, tokens)
    # one position at a time: without kernels Philox needs many times the memory of its result
    drawn = [source(seeds.unsqueeze(1), column.unsqueeze(1), role, tokens) for column in positions.unbind(1)]
    return torch.stack(drawn, 1)
