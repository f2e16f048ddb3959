"""False alarms on a real model's distributions: few audits of random tables here, the committed 200 of real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.tools import false_alarms
from bench.tools.real_rows import RowModel, real_rows
from specdec.conformance.statistics.instruments import INSTRUMENTS

COMMITTED = Path(__file__).parents[3] / "bench" / "baselines" / "audits" / "false-alarms.json"


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 64, generator=generator).double().softmax(-1)


def test_two_tokens_choose_the_row_of_the_next() -> None:
    model, table = RowModel(rows(0)), rows(0)
    cache = model.allocate(1, 8)
    logits = model.forward(torch.tensor([[3, 9, 4]]), cache)
    expected = [table[(31 * before + last) % 5] for before, last in ((0, 3), (3, 9), (9, 4))]
    torch.testing.assert_close(logits[0].exp(), torch.stack(expected))


def test_a_lossless_engine_raises_no_alarm() -> None:
    found = false_alarms.run(rows(1), rows(2), num_audits=3, num_draws=400)
    assert (found.verdicts, found.num_errors) == ({"lossless": 3}, 0)
    assert found.num_below.keys() == {*INSTRUMENTS, "arms"}
    assert all(0 < p_value <= 1 for p_value in found.smallest.values())


def test_an_engine_that_samples_other_rows_raises_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tool must be able to fail."""
    wrong = RowModel(rows(3))

    class Broken(false_alarms.RowEngine):
        def speculative(self, *args):
            self.target = wrong
            return super().speculative(*args)

    monkeypatch.setattr(false_alarms, "RowEngine", Broken)
    found = false_alarms.run(rows(1), rows(2), num_audits=1, num_draws=400)
    assert found.verdicts != {"lossless": 1}


@pytest.mark.slow
def test_real_rows_are_distributions_of_the_default_pair() -> None:
    target, draft = real_rows(16, 128)
    assert target.shape == draft.shape == (16, 128)
    assert target.sum(-1) == pytest.approx(torch.ones(16).numpy())
    assert not torch.equal(target, draft)
    assert (target.argmax(-1) == draft.argmax(-1)).double().mean() > 0.2  # they speak of the same text


def test_the_committed_audits_raised_no_alarm() -> None:
    """At most alpha = 1e-6 of a lossless engine's audits are lossy. P(p <= 0.05) <= 0.05: of 400 at most 45, and of 200
    at most 28, but with probability 1e-6 each."""
    found = false_alarms.Alarms(**json.loads(COMMITTED.read_text()))
    assert (found.num_audits, found.verdicts, found.num_errors) == (200, {"lossless": 200}, 0)
    assert found.num_below.keys() == {*INSTRUMENTS, "arms"}
    for name, (at_a_twentieth, _, at_alpha) in found.num_below.items():
        assert at_a_twentieth <= (28 if name == "arms" else 45), name
        assert at_alpha == 0
