"""The best number of draft tokens: as measured acceptance and costs predict it, and as measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.records.schema import CELL_FIELDS, Gamma, Record
from specdec.stats import predicted_speedups


@dataclass(frozen=True, slots=True)
class BestGamma:
    """Records of one engine and method that differ in gamma only, in ascending order, "auto" last.

    predicted: speed-up of gamma = 0, 1, ... up to the largest number measured; 0 is plain decoding, 1.0.
    """

    records: tuple[Record, ...]
    predicted: tuple[float, ...]

    @property
    def predicted_gamma(self) -> int:
        """The smallest gamma with the highest prediction."""
        return self.predicted.index(max(self.predicted))

    @property
    def measured(self) -> Record:
        """The record of the fastest cell, "auto" included."""
        return max(self.records, key=lambda record: record["speedup"])


def best_gammas(records: Sequence[Record]) -> list[BestGamma]:
    """One for each engine and method of a run, in the order of the run.

    Acceptance by position is that of the smallest measured gamma that is at least as large, so the prediction for a
    measured gamma is its own `predicted_speedup`. Where accepted tokens come in runs, as in copies, a smaller gamma
    starts more of its steps inside a run and is somewhat better than a larger one's acceptance predicts.
    Costs are those of all numeric gammas. "auto" has drafts of many lengths and therefore no cost of its own: it is not
    predicted, but may be the best measured. Engines without phase times, methods measured with "auto" only and trees
    are left out: a tree with fewer nodes is a different tree, not a prefix of the larger one.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.get("step_cost_ratio") is not None and record["method"] != "tree":
            key = tuple(record[name] for name in CELL_FIELDS if name != "gamma")
            groups.setdefault(key, []).append(record)
    ordered = [sorted(group, key=lambda record: _order(record["gamma"])) for group in groups.values()]
    return [BestGamma(tuple(group), _predicted(group)) for group in ordered if group[0]["gamma"] != "auto"]


def _predicted(group: Sequence[Record]) -> tuple[float, ...]:
    numeric = [record for record in group if record["gamma"] != "auto"]
    costs, predicted = [_step_cost(record) for record in numeric], [1.0]
    for record in numeric:
        rates, gamma = record["acceptance_rate_at"], record["gamma"]
        never_reached = [0.0] * (gamma - len(rates))
        share = record["num_drafted"] / record["num_steps"] / gamma
        predicted += predicted_speedups([*rates, *never_reached], share, costs)[len(predicted) :]
    return tuple(predicted)


def _step_cost(record: Record) -> tuple[float, float]:
    """(tokens drafted per step, cost of such a step in plain steps of the same cell, so that drift cancels)."""
    num_drafted = record["num_drafted"] / record["num_steps"]
    return num_drafted, num_drafted * record["cost_ratio"] + record["step_cost_ratio"]


def _order(gamma: Gamma) -> float:
    return float("inf") if gamma == "auto" else gamma
