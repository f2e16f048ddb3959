"""The predicted best gamma, from tables computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.bench_runs import decoded, printed, row_of

from bench.analysis.best_gamma import best_gammas

RATES = [0.6, 0.4, 0.2, 0.1]


def record(gamma: int | str, speedup: float, **changes: Any) -> dict[str, Any]:
    """A cell of ten steps that each draft all tokens, at 0.1 plain steps per token, and verify them at one."""
    num_drafted = 10 * (gamma if isinstance(gamma, int) else 3)
    cell = {"engine": "specdec", "pair": "tiny", "method": "eagle", "placement": "same", "workload": "smoke"}
    cell |= {"batch_size": 1, "gamma": gamma, "num_steps": 10, "num_drafted": num_drafted, "cost_ratio": 0.1}
    cell |= {"acceptance_rate_at": RATES[: num_drafted // 10], "step_cost_ratio": 1.0}
    return cell | {"speedup": speedup, "speedup_low": speedup - 0.1, "speedup_high": speedup + 0.1} | changes


def test_every_gamma_is_predicted_from_the_largest() -> None:
    (best,) = best_gammas([record(4, 1.5)])
    assert best.predicted == pytest.approx([1, 1.6 / 1.1, 2 / 1.2, 2.2 / 1.3, 2.3 / 1.4])
    assert best.predicted_gamma == 3
    assert best.measured["gamma"] == 4


def test_a_measured_gamma_is_predicted_from_its_own_acceptance_and_cost() -> None:
    """At gamma 2 more tokens are accepted; drafting one costs 0.2, so that two cost 1.4 and four 1.4, too."""
    shorter = record(2, 1.4, acceptance_rate_at=[0.7, 0.5], cost_ratio=0.2)
    (best,) = best_gammas([record(4, 1.5), shorter])
    assert best.predicted == pytest.approx([1, 1.7 / 1.2, 2.2 / 1.4, 2.2 / 1.4, 2.3 / 1.4])
    assert [each["gamma"] for each in best.records] == [2, 4]


def test_of_equal_predictions_the_shorter_draft_is_best() -> None:
    (best,) = best_gammas([record(2, 1.0, acceptance_rate_at=[0.25, 0.25], cost_ratio=0.25)])
    assert best.predicted == (1, 1, 1)
    assert best.predicted_gamma == 0


def test_of_equal_measurements_too() -> None:
    (best,) = best_gammas([record("auto", 1.5), record(4, 1.5), record(2, 1.5)])
    assert best.measured["gamma"] == 2


def test_auto_is_left_out_of_the_prediction_but_may_be_the_best_measured() -> None:
    auto = record("auto", 1.9, acceptance_rate_at=[0.9] * 8, cost_ratio=0.01)
    (best,) = best_gammas([auto, record(4, 1.5)])
    assert best.predicted == best_gammas([record(4, 1.5)])[0].predicted
    assert best.measured["gamma"] == "auto"
    assert best_gammas([auto]) == []


def test_positions_that_no_draft_reached_are_never_accepted() -> None:
    """Gamma 4, of which the proposer never had more than two."""
    (best,) = best_gammas([record(4, 1.5, acceptance_rate_at=[0.5, 0.25], num_drafted=20)])
    assert best.predicted == pytest.approx([1, 1.5 / 1.05, 1.75 / 1.1, 1.75 / 1.15, 1.75 / 1.2])


def test_engines_and_methods_are_apart_and_those_without_phase_times_left_out() -> None:
    """Like plain decoding, which has no draft to time."""
    silent = record(2, 1.2, engine="transformers", step_cost_ratio=None)
    plain = record(0, 1.0, method="autoregressive", step_cost_ratio=None)
    cells = [plain, record(4, 1.5), record(4, 1.3, method="hybrid"), silent]
    assert [best.measured["method"] for best in best_gammas(cells)] == ["eagle", "hybrid"]


def test_the_row_that_the_terminal_prints() -> None:
    arms = [record(2, 1.5), record(4, 1.4), record("auto", 1.3)]
    lines = printed([decoded("eagle") | each for each in arms])
    row = row_of(lines[lines.index("Best gamma:") :], "specdec", "eagle")
    assert row[2:] == ["3", "1.69", "2,", "4,", "auto", "2", "1.50", "[1.40,", "1.60]"]
