"""Engines compared at their best: the reference engine's fastest cell against every other engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.records.grouping import round_clusters
from bench.records.intervals import Interval, geometric_mean_interval
from bench.records.schema import Record


@dataclass(frozen=True, slots=True)
class Lead:
    """The speed of one cell over another's, by latency per emitted token, paired by round."""

    record: Record
    other: Record
    times: Interval


def leads(records: Sequence[Record]) -> list[Lead]:
    """For each other engine: the reference's plain decoding and best method over its plain decoding and its best.

    records: of cells that differ in engine, method and gamma only. These cells did not run side by side, but each ran
    beside its own engine's plain decoding, and the plain decoding of each engine beside the reference's: the ratio of
    two cells is the product of these three ratios, round by round. The best cell is chosen by the same measurement,
    which favors both sides a little. Engines without a measurement of plain decoding are skipped.
    """
    engines: dict[str, list[Record]] = {}
    for record in records:
        engines.setdefault(record["engine"], []).append(record)
    reference = engines.pop(records[0]["reference_engine"], [])
    return [lead for others in engines.values() for lead in _leads(reference, others)]


def _leads(reference: Sequence[Record], others: Sequence[Record]) -> Iterator[Lead]:
    plain = next((record for record in others if record["method"] == "autoregressive"), None)
    own_plain = next((record for record in reference if record["method"] == "autoregressive"), None)
    if not plain or not own_plain or not plain.get("reference_per_prompt_latency_s"):
        return
    between = _ratios(plain, "", plain, "reference_")
    best, other_best = _best(reference), _best(others)
    combinations = [(own_plain, plain), (best, plain), (best, other_best)]
    for record, other in combinations:
        if record and other:
            ratios = zip(_gains(record), between, _gains(other), strict=True)
            times = [gain * ratio / loss for gain, ratio, loss in ratios]
            yield Lead(record, other, geometric_mean_interval(times, round_clusters(record)))


def _best(records: Sequence[Record]) -> Record | None:
    drafting = [record for record in records if record["speedup"] is not None]
    return max(drafting, key=lambda record: record["speedup"], default=None)


def _gains(record: Record) -> list[float]:
    """How many times faster a cell is than its own engine's plain decoding, for each round."""
    its_plain = "" if record["method"] == "autoregressive" else "baseline_"
    return _ratios(record, its_plain, record, "")


def _ratios(above: Record, its_arm: str, below: Record, other_arm: str) -> list[float]:
    """Ratios of seconds per emitted token, for each round."""
    return [a / b for a, b in zip(time_per_token(above, its_arm), time_per_token(below, other_arm), strict=True)]


def time_per_token(record: Record, arm: str) -> list[float]:
    """Seconds per emitted token of each round; one number for a batch, whose rows are not independent.

    arm: "", "baseline_" or "reference_".
    """
    latencies, tokens = (_batches(record[f"{arm}per_prompt_{name}"], record) for name in ("latency_s", "tokens"))
    return [sum(batch_s) / sum(numbers) for batch_s, numbers in zip(latencies, tokens, strict=True)]


def _batches(values: Sequence[float], record: Record) -> list[Sequence[float]]:
    size = record["batch_size"]
    return [values[first : first + size] for first in range(0, len(values), size)]
