"""Philox against its published known answers, and the properties of its streams."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdec.sampling.randomness import Role, philox, uniforms

ONES = 0xFFFFFFFF
# Random123 1.14, tests/kat_vectors, lines "philox4x32 10"
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
words = st.integers(0, ONES)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter: tuple, key: tuple, answer: tuple) -> None:
    assert tuple(philox(torch.tensor(counter), torch.tensor(key)).tolist()) == answer


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.sampled_from(Role), st.integers(0, 2**31))
def test_a_uniform_depends_on_nothing_but_its_own_key(seed: int, position: int, role: Role, origin: int) -> None:
    signed = seed - 2**64 if seed >= 2**63 else seed
    alone = uniforms(*(torch.tensor([x]) for x in (signed, position, role, origin)))
    among = uniforms(
        torch.tensor([[5], [signed]]),
        torch.tensor([[1, position, 7]]),
        torch.tensor(role),
        torch.tensor([[9], [origin]]),
    )
    assert among[1, 1] == alone[0]
    assert 0 <= alone[0] < 1
    # the bit layout: 27 bits of the first word, 26 of the second
    high, low = philox(torch.tensor([position, origin, role, 0]), torch.tensor([seed & ONES, seed >> 32]))[:2].tolist()
    assert alone.item() == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_streams_do_not_collide() -> None:
    """4 x 4 x 40 x 40 combinations of the arguments give as many distinct numbers."""
    grid = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(40), torch.arange(40), indexing="ij")
    seeds, roles, positions, origins = grid
    assert uniforms(seeds, positions, roles, origins).unique().numel() == 4 * 4 * 40 * 40


def test_the_histogram_is_uniform() -> None:
    """100 equal cells, 200,000 draws: total variation within the finite-sample radius for alpha = 1e-6.

    The control is u ** 1.1, whose distance of 0.035 exceeds twice the radius.
    """
    from specdec.conformance.gates import radius

    def distance(draws: np.ndarray) -> float:
        counts = np.histogram(draws, bins=100, range=(0, 1))[0]
        return 0.5 * float(np.abs(counts / 200_000 - 0.01).sum())

    draws = uniforms(torch.tensor(3), torch.arange(200_000), torch.tensor(1), torch.tensor(0)).numpy()
    assert distance(draws) < radius(200_000, 100)
    edges = np.linspace(0, 1, 101) ** (1 / 1.1)
    assert 0.5 * np.abs(np.diff(edges) - 0.01).sum() > 2 * radius(200_000, 100)
    assert distance(draws**1.1) > radius(200_000, 100)
