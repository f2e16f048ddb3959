"""The verdict for continuous integration: its false-alarm rate by simulation, its power, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bench_runs import MACHINE, decoded, loaded, write

from bench.analysis import regressions, run_diff
from bench.analysis.run_diff import Difference
from bench.records import campaigns
from bench.records.intervals import Interval, geometric_mean_bound
from bench.records.student import t_quantile

NUM_CELLS, NUM_PROMPTS, NUM_PAIRS, RATE = 12, 8, 1500, 0.05
Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]
NOISES: dict[str, Draw] = {
    "normal": lambda random, shape: random.normal(0, 0.05, shape),
    "heavy tails": lambda random, shape: 0.05 * random.standard_t(2, shape),
    "rare delays": lambda random, shape: random.normal(0, 0.01, shape) + (random.random(shape) < 0.1) * 0.5,
}


def measured(random: np.random.Generator, draw: Draw, factor: float = 1.0) -> list[Difference]:
    """Two runs of all cells: both arms of each have noise, and a load of the machine that they share."""
    logs = np.zeros((NUM_CELLS, NUM_PROMPTS))
    for sign in (1, -1):
        load = random.normal(0, 0.5, logs.shape)
        plain, own = (load + draw(random, logs.shape) for _ in range(2))
        logs += sign * (plain - own)
    logs[0] += math.log(factor)
    return [difference(np.exp(row)) for row in logs]


def difference(ratios: Any) -> Difference:
    times = Interval(math.exp(np.log(ratios).mean()), None, None)
    return Difference(decoded("ngram", 2), run_diff.NO_DIFFERENCE, times, times, ratios=tuple(map(float, ratios)))


def num_alarms(number: int, draw: Draw, judge: Callable[[list[Difference]], list[regressions.Judged]]) -> int:
    random = np.random.default_rng(4)
    return sum(any(each.is_slower for each in judge(measured(random, draw))) for _ in range(number))


def most_alarms(number: int, rate: float, error: float = 1e-6) -> int:
    """Of `number` runs at this rate, more alarms have a probability below `error` (Hoeffding, by relative entropy)."""

    def entropy(share: float) -> float:
        return share * math.log(share / rate) + (1 - share) * math.log((1 - share) / (1 - rate))

    return next(
        each for each in range(int(number * rate) + 1, number) if number * entropy(each / number) > -math.log(error)
    )


@pytest.mark.parametrize("noise", NOISES)
def test_the_false_alarm_rate_over_all_cells_is_at_most_the_one_that_is_stated(noise: str) -> None:
    """Twelve cells of eight prompts. Negative control: each cell at the whole rate raises an alarm in nearly half."""
    found = num_alarms(NUM_PAIRS, NOISES[noise], lambda found: regressions.judged(found, RATE, 0.0))
    assert found <= most_alarms(NUM_PAIRS, RATE)


def test_without_the_correction_for_many_cells_there_are_too_many_alarms() -> None:
    """The negative control of the test above."""
    found = num_alarms(
        NUM_PAIRS, NOISES["normal"], lambda found: [regressions.judged([each], RATE, 0.0)[0] for each in found]
    )
    assert found > 4 * most_alarms(NUM_PAIRS, RATE)


def test_a_slowdown_above_the_detectable_one_is_found() -> None:
    random, times = np.random.default_rng(5), 0
    for _ in range(100):
        judged = regressions.judged(measured(random, NOISES["normal"], 1 / 1.6))
        times += judged[0].is_slower
        assert all(each.detectable < 0.5 for each in judged)
    assert times >= 95
    even = sum(regressions.judged([difference(np.exp(each))])[0].is_slower for each in shifted(random, 400))
    assert 120 < even < 280  # even chances, at the detectable slowdown of noise of 5 %


def shifted(random: np.random.Generator, number: int) -> Any:
    """Log ratios of cells whose slowdown is that which is found with even chances at the true noise."""
    radius = t_quantile(1 - regressions.FALSE_ALARM_RATE, NUM_PROMPTS - 1) * 0.05 / math.sqrt(NUM_PROMPTS)
    return random.normal(math.log(1 - regressions.TOLERANCE) - radius, 0.05, (number, NUM_PROMPTS))


def test_a_bound_is_computed_by_hand() -> None:
    """Logs of log 2 times (0, 1): mean 1/2, standard error 1/2, and t at 0.95 with one degree of freedom is 6.3138."""
    assert geometric_mean_bound([1.0, 2.0], 0.05) == pytest.approx(2 ** (0.5 + 6.31375 / 2), rel=1e-5)
    assert geometric_mean_bound([0.5, 0.5], 0.05) == 0.5
    with pytest.raises(ValueError, match="1 cluster must be at least 2"):
        geometric_mean_bound([1.0], 0.05)


def test_turns_of_a_conversation_are_one_observation() -> None:
    """Two conversations of two equal turns each are two observations, not four."""
    assert geometric_mean_bound([1.0, 1.0, 2.0, 2.0], 0.05, [0, 0, 1, 1]) == pytest.approx(
        geometric_mean_bound([1.0, 2.0], 0.05)
    )
    one = dataclasses.replace(difference([0.5] * 4), record=decoded("ngram", 2, per_prompt_conversation=[7] * 4))
    with pytest.raises(ValueError, match="there is none"):
        regressions.judged([one])


@pytest.mark.parametrize(("ratio", "slower"), [(0.97, True), (0.985, False), (1.5, False)])
def test_a_slowdown_within_the_tolerance_passes(ratio: float, slower: bool) -> None:
    (judged,) = regressions.judged([difference([ratio] * 4)])
    assert (judged.is_slower, judged.bound) == (slower, pytest.approx(ratio))
    assert judged.detectable == pytest.approx(0.02)


def differences(folder: Path, before: Any, after: Any, **changes: Any) -> list[Difference]:
    paths = [write(folder / "before.json", before), write(folder / "after.json", after, **changes)]
    return run_diff.differences(*campaigns.read_all(paths))


def test_only_paired_cells_are_judged(tmp_path: Path) -> None:
    """Plain decoding and load have nothing beside them: however slow, they are not judged."""
    before = [decoded("ngram", 2), decoded("autoregressive"), loaded(1.0, "ngram", 2)]
    plain = {"baseline_per_prompt_latency_s": [2.0, 4.0]}
    after = [
        decoded("ngram", 2, (2.0, 4.0), **plain),
        decoded("autoregressive", 0, (9.0, 18.0)),
        loaded(1.0, "ngram", 2, 9.0),
    ]
    (judged,) = regressions.judged(differences(tmp_path, before, after))
    assert judged.difference.ratios == (0.5, 0.5)
    assert judged.is_slower


@pytest.mark.parametrize(("reference_s", "slower"), [([2.0, 4.0], True), ([1.0, 2.0], False)])
def test_the_reference_engine_is_judged_beside_another(reference_s: list[float], slower: bool, tmp_path: Path) -> None:
    """Its plain decoding has no other pair: where it became slower as a whole, its speed-ups are as before."""
    before, after = (
        [decoded("autoregressive", engine="transformers", reference_per_prompt_tokens=[10] * 2, **times)]
        for times in ({"reference_per_prompt_latency_s": each} for each in ([1.0, 2.0], reference_s))
    )
    (judged,) = regressions.judged(differences(tmp_path, before, after))
    assert (judged.of_reference, judged.is_slower) == (True, slower)
    assert judged.times.estimate == pytest.approx(0.5 if slower else 1.0)


def test_a_slow_machine_is_no_slow_cell(tmp_path: Path) -> None:
    (judged,) = regressions.judged(differences(tmp_path, [decoded("ngram", 2)], [decoded("ngram", 2, (9.0, 18.0))]))
    assert not judged.is_slower


def test_another_machine_is_not_compared(tmp_path: Path) -> None:
    found = differences(
        tmp_path, [decoded("ngram", 2)], [decoded("ngram", 2)], machine_info=MACHINE | {"cpu_model": "another"}
    )
    with pytest.raises(ValueError, match="paired in both runs, but there is none: machine: cpu_model was"):
        regressions.judged(found)
    with pytest.raises(ValueError, match="none: no cell is in both"):
        regressions.judged(differences(tmp_path, [decoded("ngram", 2)], [decoded("ngram", 4)]))
