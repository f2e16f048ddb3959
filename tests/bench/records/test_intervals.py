"""Intervals of speed-ups, rates and differences: against hand-computed values, and their coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from bench.records.grouping import clusters_of_batches, round_clusters
from bench.records.intervals import (
    Interval,
    geometric_mean_interval,
    length_interval,
    mean_difference_interval,
    rate_interval,
    unpaired_ratio_interval,
)
from bench.records.student import t_quantile

T_7, T_1 = 2.364624, 12.706205  # 97.5 % quantiles of Student's t with 7 degrees of freedom and with 1, from tables


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, T_1), (2, 4.302653), (3, 3.182446), (4, 2.776445), (7, T_7), (10, 2.228139), (30, 2.042272), (100, 1.983972)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(quantile, abs=1e-6)


def test_quantiles_of_other_probabilities() -> None:
    """By hand: with one degree of freedom the quantile is tan(pi * (p - 1/2)), and with two the cdf is algebraic."""
    assert t_quantile(0.75, 1) == pytest.approx(1.0)
    assert t_quantile(0.75, 2) == pytest.approx(math.sqrt(2 / 3))
    for probability, degrees in ((0.5, 3), (1.0, 3), (0.975, 0)):
        with pytest.raises(ValueError, match=rf"probability={probability} must lie in .* degrees={degrees} must be"):
            t_quantile(probability, degrees)


def ends(interval: Interval | None) -> list[float]:
    assert interval is not None
    assert interval.low is not None
    assert interval.high is not None
    return [interval.low, interval.high]


def test_equal_ratios_leave_no_doubt() -> None:
    interval = geometric_mean_interval([1.5] * 6)
    assert [interval.estimate, *ends(interval)] == pytest.approx([1.5] * 3)
    assert ends(geometric_mean_interval([1.1] * 7)) == [geometric_mean_interval([1.1] * 7).estimate] * 2


def test_equal_differences_have_no_width_whatever_their_rounding() -> None:
    """The mean of three times 0.1 is not 0.1 in floating point, so that their standard deviation is not 0."""
    assert np.std([0.1] * 3) > 0
    found = mean_difference_interval([0.1] * 3, [0.0] * 3)
    assert ends(found) == [found.estimate] * 2


def test_two_observations_leave_much_doubt() -> None:
    """Logarithms 0 and 2 log 2: the mean is log 2, its standard error log 2, with one degree of freedom."""
    interval = geometric_mean_interval([1.0, 4.0])
    assert [interval.estimate, *ends(interval)] == pytest.approx([2.0, 2 ** (1 - T_1), 2 ** (1 + T_1)], rel=1e-5)


def test_eight_observations_by_hand() -> None:
    """Logarithms four times 0 and four times 1: variance 8 * 0.25 / 7 of one, 2 / 56 of their mean."""
    interval = geometric_mean_interval([1.0] * 4 + [math.e] * 4)
    radius = T_7 * math.sqrt(2 / 56)
    assert [math.log(each) for each in ends(interval)] == pytest.approx([0.5 - radius, 0.5 + radius], rel=1e-5)


def test_turns_of_a_conversation_are_one_observation_by_hand() -> None:
    """Logarithms 1, 3 and -1, 1 of two conversations: residuals 0, 2 and -2, 0 of the mean 1, with sums 2 and -2.

    The standard error is sqrt(2 / 1 * (4 + 4)) / 4 = 1, with one degree of freedom. Four independent prompts would have
    sqrt(8 / 3) / 2 = 0.816 with three.
    """
    ratios = [math.exp(each) for each in (1, 3, -1, 1)]
    interval = geometric_mean_interval(ratios, [7, 7, 4, 4])
    assert interval.estimate == pytest.approx(math.e)
    assert np.log(ends(interval)) == pytest.approx([1 - T_1, 1 + T_1], rel=1e-6)
    alone = geometric_mean_interval(ratios, [0, 1, 2, 3])
    assert ends(alone) == pytest.approx(ends(geometric_mean_interval(ratios)))
    assert np.log(ends(alone)) == pytest.approx([1 + sign * 3.182446 * math.sqrt(8 / 3) / 2 for sign in (-1, 1)])
    assert geometric_mean_interval(ratios, [0] * 4) == Interval(pytest.approx(math.e), None, None)
    with pytest.raises(ValueError, match="3 clusters must be one for each of the 4 values"):
        geometric_mean_interval(ratios, [0, 1, 2])


def test_rates_and_lengths_of_conversations_are_those_of_their_sums() -> None:
    """Deleting a conversation deletes all of its turns."""
    accepted, drafted, clusters = [1, 2, 3, 0, 2], [4, 4, 6, 0, 8], [0, 0, 2, 1, 2]
    assert rate_interval(accepted, drafted, clusters) == rate_interval([3, 5], [8, 14])
    emitted = [a + d for a, d in zip(accepted, drafted, strict=True)]
    assert length_interval(emitted, drafted, clusters) == length_interval([11, 19], [8, 14])
    (one,) = {rate_interval(accepted, drafted, [5] * 5)}
    assert one == Interval(8 / 22, None, None)


@pytest.mark.parametrize(
    ("conversations", "batch_size", "clusters"),
    [
        ([0, 0, 1, 1, 2, 2], 1, [0, 0, 1, 1, 2, 2]),
        ([0, 0, 1, 1, 2, 2], 2, [0, 1, 2]),
        ([0, 0, 0, 1, 1, 2], 2, [0, 0, 0]),  # the second batch has the first conversation and the second, and so on
        ([0, 1, 2, 3, 3], 2, [0, 2, 2]),
        ([3, 1, 1, 3], 1, [3, 1, 1, 3]),
    ],
)
def test_batches_that_share_a_conversation_are_one_cluster(
    conversations: list[int], batch_size: int, clusters: list[int]
) -> None:
    assert clusters_of_batches(conversations, batch_size) == clusters
    assert round_clusters({"per_prompt_conversation": conversations, "batch_size": batch_size}) == clusters
    assert round_clusters({"batch_size": batch_size}) is None  # of a run before conversations were recorded


def test_the_inverse_has_the_inverse_interval() -> None:
    ratios = [1.1, 1.3, 0.9, 1.6, 1.2, 1.4]
    interval, inverse = geometric_mean_interval(ratios), geometric_mean_interval([1 / ratio for ratio in ratios])
    assert inverse.estimate == pytest.approx(1 / interval.estimate)
    assert ends(inverse) == pytest.approx([1 / end for end in reversed(ends(interval))])


def test_one_observation_has_no_interval() -> None:
    interval = geometric_mean_interval([1.2])
    assert (interval.estimate, interval.low, interval.high) == (1.2, None, None)


@pytest.mark.parametrize("ratios", [[], [1.0, 0.0], [1.0, -2.0], [math.nan], [math.inf]])
def test_ratios_must_be_positive(ratios: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite, > 0 and at least one"):
        geometric_mean_interval(ratios)


def test_absurd_times_of_a_file_do_not_overflow() -> None:
    assert all(map(math.isfinite, ends(geometric_mean_interval([1e-300, 1e300, 1.0]))))


def test_a_rate_is_a_ratio_of_sums() -> None:
    """Two prompts: without the one it is 9/30, without the other 1/10. Their distance is 0.2, half of it the
    jackknife's standard error, and the radius on the logit scale that times t / (r (1 - r)).
    """
    interval = rate_interval([1, 9], [10, 30])
    assert interval is not None
    reach = 0.1 * T_1 / (0.25 * 0.75)
    expected = [1 / (1 + 3 * math.exp(sign * reach)) for sign in (1, -1)]
    assert [interval.estimate, *ends(interval)] == pytest.approx([0.25, *expected], rel=1e-4)
    assert rate_interval([3], [10]) == Interval(0.3, None, None)


def test_a_length_is_on_the_logarithmic_scale_and_at_least_one() -> None:
    """Tokens per step, 20/10 and 20/5: 40/15 in all. Without the one 4, without the other 2: standard error 1."""
    interval = length_interval([20, 20], [10, 5])
    assert ends(interval) == pytest.approx([1.0, 40 / 15 * math.exp(T_1 / (40 / 15))], rel=1e-5)
    # 10/5 and 11/5: without the one 2.2, without the other 2, so a standard error of 0.1 about 2.1
    reach = 0.1 * T_1 / 2.1
    assert ends(length_interval([10, 11], [5, 5])) == pytest.approx(
        [2.1 * math.exp(-reach), 2.1 * math.exp(reach)], rel=1e-5
    )
    assert length_interval([2, 3], [2, 3]) == Interval(1.0, 1.0, 1.0)
    assert length_interval([3, 3], [2, 2]) == Interval(1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match=r"length=0\.5 must be at least 1"):
        length_interval([1, 1], [2, 2])


def test_prompts_without_a_draft_say_nothing_of_the_rate() -> None:
    assert rate_interval([0, 0], [0, 0]) is None
    assert rate_interval([5, 0, 0], [10, 0, 0]) == Interval(0.5, None, None)
    assert rate_interval([5, 0, 6, 0], [10, 0, 10, 0]) == rate_interval([5, 6], [10, 10])


def test_a_rate_at_an_end_has_no_width() -> None:
    assert rate_interval([4, 4, 4], [4, 4, 4]) == Interval(1.0, 1.0, 1.0)
    assert rate_interval([0, 0, 0], [4, 4, 4]) == Interval(0.0, 0.0, 0.0)


def test_equal_rates_have_no_width() -> None:
    assert rate_interval([3, 3], [10, 10]) == Interval(0.3, 0.3, 0.3)  # not what its logit gives back


def test_a_rate_of_1_has_no_logit() -> None:
    """Also in a damaged file, where a prompt has more accepted than drafted tokens."""
    assert rate_interval([5, 3], [4, 4]) == Interval(1.0, 1.0, 1.0)


def test_a_wide_interval_of_a_rate_does_not_overflow() -> None:
    """All accepted tokens are of one prompt, which has few: the ends are 6,000 away on the logit scale."""
    assert ends(rate_interval([0, 10], [10_000, 10])) == [0.0, 1.0]


def test_the_interval_of_a_rate_agrees_with_the_normal_one() -> None:
    """Independent tokens, 20 of each of 300 prompts."""
    accepted = np.random.default_rng(1).binomial(20, 0.3, 300).tolist()
    interval = rate_interval(accepted, [20] * 300)
    assert interval is not None
    radius = 1.96 * math.sqrt(0.3 * 0.7 / 6000)
    expected = [interval.estimate - radius, interval.estimate + radius]
    assert ends(interval) == pytest.approx(expected, abs=0.15 * radius)


def test_a_part_cannot_exceed_the_whole() -> None:
    with pytest.raises(ValueError, match="rate=2 must be at most 1"):
        rate_interval([8, 8], [4, 4])


@pytest.mark.parametrize(("accepted", "drafted"), [([1, 2], [3]), ([1], [2, 3])])
def test_counts_of_other_prompts_are_refused(accepted: list[int], drafted: list[int]) -> None:
    message = f"{len(accepted)} numerators must be as many as the denominators, {len(drafted)}"
    with pytest.raises(ValueError, match=message):
        rate_interval(accepted, drafted)


def test_unpaired_ratios_have_an_interval() -> None:
    """Logarithms 0 and 2 above, 0 and 1 below: variances of the means 1 and 1/4, so 1.5625 / 1.0625 = 1.47 degrees."""
    found = unpaired_ratio_interval([8.0] * 4, [2.0] * 3)
    assert [found.estimate, found.low, found.high] == pytest.approx([4.0, 4.0, 4.0])
    assert unpaired_ratio_interval([8.0], [2.0]) == Interval(pytest.approx(4.0), None, None)
    logs = [math.log(end) for end in ends(unpaired_ratio_interval([1.0, math.e**2], [1.0, math.e]))]
    radius = T_1 * math.sqrt(1.25)
    assert logs == pytest.approx([0.5 - radius, 0.5 + radius], rel=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_unpaired_values_must_be_positive(value: float) -> None:
    with pytest.raises(ValueError, match=rf"values=\[{value}\] must be finite, > 0"):
        unpaired_ratio_interval([1.0], [value])


def test_a_difference_is_paired() -> None:
    """Prompt by prompt the difference is always 0.5, however far the prompts are apart."""
    assert mean_difference_interval([0.5, 1.0, 0.5, 1.0], [0.0, 0.5, 0.0, 0.5]) == Interval(0.5, 0.5, 0.5)
    # differences 1 and 4: mean 2.5, standard error 1.5
    interval = mean_difference_interval([3.0, 5.0], [2.0, 1.0])
    assert [interval.estimate, *ends(interval)] == pytest.approx([2.5, 2.5 - 1.5 * T_1, 2.5 + 1.5 * T_1], rel=1e-5)
    assert mean_difference_interval([3.0], [1.0]) == Interval(2.0, None, None)


@pytest.mark.parametrize(("values", "others"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0])])
def test_differences_need_pairs(values: list[float], others: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(values)} and {len(others)} values must be pairs, at least one"):
        mean_difference_interval(values, others)


NUM_RUNS, NUM_PROMPTS = 2000, 8
SLACK = 5 * math.sqrt(0.95 * 0.05 / NUM_RUNS)  # five standard errors of a measured coverage: 2.4 points


def coverage(truth: float, run: Callable[[np.random.Generator], Interval | None]) -> float:
    """The share of simulated runs whose interval holds the true value."""
    random = np.random.default_rng(5)
    found = [ends(run(random)) for _ in range(NUM_RUNS)]
    return sum(low <= truth <= high for low, high in found) / NUM_RUNS


def clustered(random: np.random.Generator, rate: float, likeness: float) -> tuple[list[int], list[int]]:
    """(accepted, drafted) tokens of eight prompts of 8 to 64 steps of 4 tokens, each with its own acceptance rate.

    likeness: correlation of two tokens of one prompt.
    """
    own = random.beta(rate * (1 / likeness - 1), (1 - rate) * (1 / likeness - 1), NUM_PROMPTS)
    drafted = 4 * random.integers(8, 64, NUM_PROMPTS)
    return random.binomial(drafted, own).tolist(), drafted.tolist()


def percentile_bootstrap(accepted: list[int], drafted: list[int], random: np.random.Generator) -> Interval:
    """The interval that these replace."""
    rows = random.integers(NUM_PROMPTS, size=(500, NUM_PROMPTS))
    rates = np.array(accepted)[rows].sum(1) / np.array(drafted)[rows].sum(1)
    return Interval(0.0, *(float(end) for end in np.quantile(rates, [0.025, 0.975])))


@pytest.mark.parametrize("shape", ["normal", "skewed"])
def test_intervals_of_eight_speedups_cover_the_truth(shape: str) -> None:
    """Exactly 95 % for ratios whose logarithms are normal; for a skewed distribution a little less."""

    def run(random: np.random.Generator) -> Interval:
        noise = random.normal(0, 0.2, NUM_PROMPTS) if shape == "normal" else random.gamma(4, 0.1, NUM_PROMPTS) - 0.4
        return geometric_mean_interval((1.7 * np.exp(noise)).tolist())

    assert coverage(1.7, run) > 0.95 - SLACK - (0.0 if shape == "normal" else 0.02)


@pytest.mark.parametrize(("rate", "likeness"), [(0.3, 0.05), (0.6, 0.02), (0.6, 0.1), (0.6, 0.3), (0.9, 0.1)])
def test_intervals_of_eight_acceptance_rates_cover_the_truth(rate: float, likeness: float) -> None:
    """Tokens of a prompt resemble each other. The percentile bootstrap, as a control, is far from what it promises."""
    found = coverage(rate, lambda random: rate_interval(*clustered(random, rate, likeness)))
    assert found > 0.95 - SLACK - 0.025
    control = coverage(rate, lambda random: percentile_bootstrap(*clustered(random, rate, likeness), random))
    assert control < 0.95 - SLACK - 0.025
    assert found > control + 0.03


def test_intervals_of_eight_acceptance_lengths_cover_the_truth() -> None:
    """Steps of 4 drafts that are accepted with 0.7 each, which differs by prompt: E[1 + a + ... + a^4] by numbers."""
    grid = np.random.default_rng(6).beta(14, 6, 1_000_000)
    truth = float(sum((grid**power).mean() for power in range(5)))

    def run(random: np.random.Generator) -> Interval | None:
        steps = random.integers(8, 64, NUM_PROMPTS)
        own = random.beta(14, 6, NUM_PROMPTS)
        lengths = [
            int((1 + (random.random((count, 4)) < each).cumprod(1).sum(1)).sum())
            for count, each in zip(steps, own, strict=True)
        ]
        return length_interval(lengths, steps.tolist())

    assert coverage(truth, run) > 0.95 - SLACK - 0.025


def test_intervals_of_two_runs_cover_the_truth() -> None:
    def run(random: np.random.Generator) -> Interval:
        above, below = np.exp(random.normal(0.7, 0.1, NUM_PROMPTS)), np.exp(random.normal(0.2, 0.4, 5))
        return unpaired_ratio_interval(above.tolist(), below.tolist())

    assert coverage(math.exp(0.5), run) > 0.95 - SLACK


def test_intervals_of_turns_cover_the_truth_if_conversations_are_the_observations() -> None:
    """Eight conversations of three turns, which share half of their variance: taken as 24 prompts they cover less."""

    def conversations(random: np.random.Generator) -> list[float]:
        shared, own = random.normal(0, 0.2, 8), random.normal(0, 0.2, (8, 3))
        return np.exp(0.5 + shared[:, None] + own).ravel().tolist()

    clusters = [number for number in range(8) for _ in range(3)]
    truth = math.exp(0.5)
    assert coverage(truth, lambda random: geometric_mean_interval(conversations(random), clusters)) >= 0.93
    assert coverage(truth, lambda random: geometric_mean_interval(conversations(random))) <= 0.88
