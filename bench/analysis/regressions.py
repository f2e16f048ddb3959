"""Whether a later run is slower in any cell: one verdict with a stated false-alarm rate, for continuous integration.

Only what is paired inside both runs is tested, prompt by prompt: each cell's speed-up over plain decoding, and
the speed of the reference engine's plain decoding over that of each other engine. If nothing changed, the two runs are
exchangeable, so the differences of their log ratios are symmetric about 0, for which Student's t keeps its level. Each
ratio is tested at an equal share of the false-alarm rate (Bonferroni), which needs no independence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.analysis.run_diff import Difference
from bench.records.grouping import round_clusters
from bench.records.intervals import Interval, geometric_mean_bound, geometric_mean_interval

FALSE_ALARM_RATE = 0.01  # the probability that two runs without a change have a cell called slower
TOLERANCE = 0.02  # a slowdown up to this share passes: the pairing does not cancel everything between two runs


@dataclass(frozen=True, slots=True)
class Judged:
    """A ratio of speeds in the later run over that in the earlier one.

    of_reference: whether the speed is that of the reference engine over this one's, instead of this cell's speed-up.
    times: the ratio and its 95 % interval. bound: at most this ratio is compatible with the measurement.
    detectable: the slowdown, as a share, that would have been found with even chances.
    """

    difference: Difference
    of_reference: bool
    times: Interval
    bound: float
    detectable: float
    is_slower: bool


def judged(
    found: Sequence[Difference], false_alarm_rate: float = FALSE_ALARM_RATE, tolerance: float = TOLERANCE
) -> list[Judged]:
    """Every ratio that was measured side by side in both runs, over at least two rounds or conversations.

    Raises ValueError if there is none: then nothing can be concluded.
    """
    paired = [each for difference in found for each in _paired(difference)]
    if not paired:
        reasons = "; ".join(dict.fromkeys(reason for each in found for reason in each.reasons)) or "no cell is in both"
        raise ValueError(f"fail_on=slower must have cells that are paired in both runs, but there is none: {reasons}")
    return [_judged(*each, false_alarm_rate / len(paired), tolerance) for each in paired]


def _paired(difference: Difference) -> Iterator[tuple[Difference, bool, tuple[float, ...]]]:
    """The ratios of a cell, and whether they are of the reference engine; the latter for plain decoding only."""
    of_reference = not difference.ratios and difference.record["method"] == "autoregressive"
    ratios = difference.reference_ratios if of_reference else difference.ratios
    if ratios and len(set(round_clusters(difference.record) or range(len(ratios)))) > 1:
        yield difference, of_reference, ratios


def _judged(
    difference: Difference, of_reference: bool, ratios: Sequence[float], level: float, tolerance: float
) -> Judged:
    clusters, least = round_clusters(difference.record), 1 - tolerance
    times, bound = geometric_mean_interval(ratios, clusters), geometric_mean_bound(ratios, level, clusters)
    return Judged(difference, of_reference, times, bound, 1 - least * times.estimate / bound, bound < least)
