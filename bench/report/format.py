"""Numbers, cells and verdicts in words."""

from __future__ import annotations

from bench.records.intervals import Interval
from bench.records.schema import Record


def interval(found: Interval, form: str = ".2f") -> str:
    """An estimate, and the ends of its interval if it has one."""
    if found.low is None or found.high is None:
        return f"{found.estimate:{form}}"
    return f"{found.estimate:{form}} [{found.low:{form}}, {found.high:{form}}]"


def cell_name(record: Record) -> str:
    gamma = "" if record["method"] == "autoregressive" else f" {record['gamma']}"
    return f"{record['engine']} {record['method']}{gamma}"


def verdict(record: Record) -> str:
    """An audit's verdict, always with the bound on the total variation distance that it rests on."""
    found, max_tv = record["verdict"], record.get("max_tv")
    if found == "lossless":
        return f"lossless (TV < {max_tv:g})" if max_tv else "lossless (TV bound not recorded)"
    return f"lossy (TV > {record.get('tv_lower_bound') or 0:.2g})" if found == "lossy" else str(found)
