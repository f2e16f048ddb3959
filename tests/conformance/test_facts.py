"""The sums over a distribution, by hand and against the obvious computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.strategies import distribution_rows
from hypothesis import given

from specdec.conformance.statistics import facts
from specdec.conformance.statistics.facts import EXPONENTS, Facts


def test_by_hand() -> None:
    distribution, draft = torch.tensor([[2, 1, 1]]).double() / 4, torch.tensor([[1, 1, 2]]).double() / 4
    of = Facts.of(distribution.expand(3, 3), torch.tensor([0, 1, 2]), draft.expand(3, 3))
    log2 = math.log(2)
    assert of.prob.tolist() == [0.5, 0.25, 0.25]
    assert of.above.tolist() == [0, 0.5, 0.75]  # of two equals the smaller id comes first
    assert of.before.tolist() == [0, 0.5, 0.75]
    assert of.entropy == pytest.approx([1.5 * log2] * 3)
    assert of.variance == pytest.approx([0.25 * log2**2] * 3)
    assert of.collision.tolist() == [0.375] * 3
    tempered = dict(zip(EXPONENTS, of.tempered[0], strict=True))
    assert tempered[1.0] == pytest.approx(math.log(0.375))
    assert tempered[-1 / 2] == pytest.approx(math.log(math.sqrt(0.5) + 1))
    assert (of.up[0], of.down[0]) == (0.25, 0.5)
    assert of.sign.tolist() == [-1, 0, 1]


def test_rank_and_id_order_differ() -> None:
    of = Facts.of(torch.tensor([[0.1, 0.2, 0.7]]).double(), torch.tensor([1]))
    assert (of.above[0], of.before[0]) == pytest.approx((0.7, 0.1))
    assert (of.up[0], of.down[0], of.sign[0]) == (0, 0, 0)


@given(distribution_rows(7, 5), distribution_rows(7, 5))
def test_zeros_ties_and_blocks(distributions: torch.Tensor, drafts: torch.Tensor) -> None:
    tokens = torch.arange(7) % 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facts, "_BLOCK", 15)  # three distributions at a time
        of = Facts.of(distributions, tokens, drafts)
    for row, (distribution, draft) in enumerate(zip(distributions.numpy(), drafts.numpy(), strict=True)):
        order = sorted(range(5), key=lambda token: (-distribution[token], token))
        mine = order.index(int(tokens[row]))
        kept = distribution[distribution > 0]
        assert of.above[row] == pytest.approx(distribution[order[:mine]].sum())
        assert of.entropy[row] == pytest.approx(-(kept * np.log(kept)).sum(), abs=1e-9)
        assert of.tempered[row] == pytest.approx(np.log([(kept ** (1 + e)).sum() for e in EXPONENTS]), abs=1e-9)
        assert (of.up[row], of.down[row]) == pytest.approx(
            (distribution[draft > distribution].sum(), distribution[draft < distribution].sum())
        )


def test_a_row_may_be_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    distributions, tokens = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25]]).double(), torch.tensor([1, 2])
    expected = Facts.of(distributions, tokens)
    monkeypatch.setattr(facts, "_BLOCK", 2)
    of = Facts.of(distributions, tokens)
    assert (of.above.tolist(), of.entropy.tolist()) == (expected.above.tolist(), expected.entropy.tolist())


def test_no_variance_is_negative() -> None:
    """That of a uniform distribution is 0, and rounding in float32 may leave less."""
    for size in range(2, 200):
        assert Facts.of(torch.full((1, size), 1 / size), torch.tensor([0])).variance[0] >= 0


def test_float32_keeps_six_digits_over_a_wide_vocabulary() -> None:
    """Errors of sums add up over an audit's tokens: 20,000 of them must not amount to a p-value."""
    generator = torch.Generator().manual_seed(0)
    distributions = torch.randn(4, 49_152, generator=generator).mul(3).softmax(-1)
    tokens = torch.tensor([0, 17, 40_000, 49_151])
    narrow, wide = Facts.of(distributions, tokens), Facts.of(distributions.double(), tokens)
    for name in ("above", "before", "tempered", "collision"):
        assert np.abs(getattr(narrow, name) - getattr(wide, name)).max() < 3e-6
