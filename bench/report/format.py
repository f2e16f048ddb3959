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
    """An audit's verdict with its bound on the total variation distance, or with what found it before it was bounded.

    The words are those of `certificate.bounded`, which needs torch.
    """
    found, max_tv = record["verdict"], record.get("max_tv")
    if found == "lossless":
        return f"lossless (TV < {max_tv:g})" if max_tv else "lossless (TV bound not recorded)"
    if found != "lossy":
        return str(found)
    if low := record.get("tv_lower_bound"):
        return f"lossy (TV > {low:.2g})"
    if record.get("errors"):
        return "lossy (invalid output)"
    return f"lossy (distribution differs, p = {record['p_value']:.2g})"
