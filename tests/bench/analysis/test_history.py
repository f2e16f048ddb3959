"""Series of nightly runs: their change-points, with the false-alarm rate by simulation."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bench_runs import MACHINE, decoded, write

from bench.analysis import history
from bench.analysis.history import change_points, histories
from bench.records import results
from bench.records.results import Results

LEVEL = 0.02
GAMMAS = range(1, 51)


def night(folder: Path, number: int, *records: Any, **changes: Any) -> Results:
    path = folder / f"night-{number:02}.json"
    return results.read(write(path, records, datetime=f"2026-03-{number:02}T04:00:00+00:00", **changes))


def noisy(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Any:
    return random.normal(0, 0.05, shape) if kind == "normal" else np.exp(random.standard_t(2, shape))


@pytest.mark.parametrize("kind", ["normal", "heavy and skewed"])
def test_series_without_a_change_are_marked_at_the_stated_rate(kind: str) -> None:
    """Of 600 at a level of 0.02 more than 30 have a probability below 1e-5, for any distribution of the noise."""
    random = np.random.default_rng(1)
    found = [bool(change_points(each, LEVEL, seed)) for seed, each in enumerate(noisy(random, kind, (600, 20)))]
    assert sum(found) <= 30


def test_a_change_is_found_where_it_is() -> None:
    random = np.random.default_rng(2)
    values = random.normal(0, 0.02, (40, 24)) + np.where(np.arange(24) < 16, 0, 0.1)
    found = [change_points(each, 1e-3) for each in values]
    assert sum([at for at, _ in each] == [16] for each in found) >= 36


def test_two_changes_are_found() -> None:
    values = [0.0, 0.01] * 10 + [1.0, 1.01] * 10 + [0.5, 0.51] * 10
    assert [at for at, _ in change_points(values, 1e-3)] == [20, 40]


def test_the_p_value_is_that_of_all_orders() -> None:
    """Four ones and four threes: of the 70 orders two are as far apart, so 1/35; random orders come close to it."""
    values = [1.0] * 4 + [3.0] * 4
    orders = [[3.0 if index in chosen else 1.0 for index in range(8)] for chosen in itertools.combinations(range(8), 4)]
    scores = [history._scores(np.array(order)).max() for order in orders]
    exact = sum(score >= scores[0] - 1e-9 for score in scores) / len(scores)
    assert exact == 2 / 70
    ((at, p_value),) = change_points(values, 0.05)
    assert at == 4
    assert p_value == pytest.approx(exact, abs=0.008)  # five standard errors of 9,999 draws


def test_a_score_is_computed_by_hand() -> None:
    """0, 0, 3: the sums of deviations are -1 and -2, over the roots of 1 * 2 and 2 * 1."""
    assert history._scores(np.array([0.0, 0.0, 3.0])).tolist() == pytest.approx([1 / 2**0.5, 2 / 2**0.5])


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [2.0] * 30])
def test_few_or_equal_values_have_no_change(values: list[float]) -> None:
    assert change_points(values, 0.5) == []


def test_a_change_names_its_levels_and_what_else_changed(tmp_path: Path) -> None:
    runs = []
    for number in range(1, 21):
        versions = MACHINE["versions"] | {"torch": "2.14.0" if number > 12 else "2.13.0"}
        speedup = (2.0 if number > 12 else 1.0) * (1.01 if number % 2 else 1.0)
        record = decoded("ngram", 2, speedup=speedup)
        runs.append(night(tmp_path, number, record, machine_info=MACHINE | {"versions": versions}))
    speedups, lengths = histories(runs[::-1])
    assert (speedups.metric, len(speedups.points), lengths.changes) == ("speedup", 20, ())
    assert [point.run.date for point in speedups.points] == sorted(run.date for run in runs)
    (change,) = speedups.changes
    assert (change.at, change.circumstances) == (12, ("versions: torch was 2.13.0 and is 2.14.0",))
    assert (change.before, change.after) == (pytest.approx(1.01**0.5), pytest.approx(2 * 1.01**0.5))
    assert change.p_value < 1e-3


def test_other_options_are_another_series(tmp_path: Path) -> None:
    runs = [night(tmp_path, 1, decoded("ngram", 2)), night(tmp_path, 2, decoded("ngram", 2, max_tokens=20))]
    found = histories(runs)
    assert [(each.metric, len(each.points), each.record["max_tokens"]) for each in found] == [
        ("speedup", 1, 20),
        ("speedup", 1, 10),
        ("mean_acceptance_length", 1, 20),
        ("mean_acceptance_length", 1, 10),
    ]


def test_plain_decoding_is_shown_beside_the_reference_engine_only(tmp_path: Path) -> None:
    cells = [decoded("autoregressive"), decoded("autoregressive", engine="vllm", speedup_of_reference=1.5)]
    (only,) = histories([night(tmp_path, 1, *cells)])
    assert (only.metric, only.record["engine"], only.points[0].value) == ("speedup_of_reference", "vllm", 1.5)


def test_a_page_of_many_series_has_the_rate_of_one(tmp_path: Path) -> None:
    """The level of a series is the page's over their number: what one series would mark is noise among a hundred."""
    values = [1.0, 1.01, 1.0, 1.01, 1.06, 1.07, 1.06, 1.07]
    cells = [[decoded("ngram", gamma, speedup=value if gamma == 1 else 1.5) for gamma in GAMMAS] for value in values]
    runs = [night(tmp_path, number, *records) for number, records in enumerate(cells, 1)]
    assert any(series.changes for series in histories([one_cell(run) for run in runs], 0.2))
    assert not any(series.changes for series in histories(runs, 0.2))


def one_cell(run: Results) -> Results:
    return dataclasses.replace(run, cells=run.cells[:1])
