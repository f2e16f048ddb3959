"""Numbers and cells in words, for tables and reports."""

from __future__ import annotations

from typing import Any

from bench.analysis.best_gamma import BestGamma
from bench.analysis.engine_ratios import Lead
from bench.records.intervals import BootstrapInterval

Record = dict[str, Any]


def number(value: float | None, digits: int, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def percent(rate: float | None, digits: int = 1) -> str:
    return "-" if rate is None else f"{100 * rate:.{digits}f}%"


def interval(record: Record, name: str, form: str = ".2f") -> str:
    """A field with the ends of its interval, if it has any."""
    value, low, high = (record[f"{name}{end}"] for end in ("", "_low", "_high"))
    return between(BootstrapInterval(value, low, high), form) if value is not None else "-"


def between(told: BootstrapInterval, form: str = ".2f") -> str:
    if told.low is None or told.high is None:
        return f"{told.estimate:{form}}"
    return f"{told.estimate:{form}} [{told.low:{form}}, {told.high:{form}}]"


def cell_name(record: Record) -> str:
    gamma = "" if record["method"] == "autoregressive" else f" {record['gamma']}"
    return f"{record['engine']} {record['method']}{gamma}"


def lead(found: Lead) -> str:
    return f"{cell_name(found.ours)} is {between(found.times)} times as fast as {cell_name(found.theirs)}"


def best_gamma(best: BestGamma) -> str:
    measured, gamma = best.measured, best.predicted_gamma
    gammas = ", ".join(str(record["gamma"]) for record in best.records)
    return (
        f"{measured['engine']} {measured['method']}: predicted best gamma {gamma} ({best.predicted[gamma]:.2f}), "
        f"measured best of {gammas}: {measured['gamma']} ({interval(measured, 'speedup')})"
    )


def verdict(record: Record) -> str:
    """An audit's verdict with the distance in total variation that it rests on, where the record has it."""
    if record["verdict"] == "lossless" and record.get("max_tv"):
        return f"lossless (TV < {record['max_tv']:g})"
    if record["verdict"] == "lossy" and record.get("tv_lower_bound"):
        return f"lossy (TV > {record['tv_lower_bound']:.2g})"
    return str(record["verdict"])
