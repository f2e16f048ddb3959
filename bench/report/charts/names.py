"""Titles and file names of charts."""

from __future__ import annotations

import re
from typing import Any

Record = dict[str, Any]


def arm(method: str, gamma: Any) -> str:
    return "plain decoding" if method == "autoregressive" else f"{method}, gamma {gamma}"


def about(record: Record, *, with_batch: bool = True) -> str:
    """The models and prompts of a chart."""
    parts = [
        models(record),
        record["workload"],
        *([f"batch size {record['batch_size']}"] if with_batch else []),
        *([f"placement {record['placement']}"] if record.get("placement", "same") != "same" else []),
        distribution(record),
    ]
    return ", ".join(map(str, parts))


def name(kind: str, record: Record, *, with_engine: bool = True, with_batch: bool = True) -> str:
    """The name of a chart's file."""
    parts = [kind, *([record["engine"]] if with_engine else []), record["pair"], record["workload"]]
    parts += [f"batch-{record['batch_size']}"] if with_batch else []
    parts += [record["placement"]] if record.get("placement", "same") != "same" else []
    return file_name("-".join(map(str, parts)))


def file_name(text: str) -> str:
    """Text as part of a file name."""
    return re.sub(r"[^\w.-]+", "-", text)


def models(record: Record) -> str:
    return f"{record['pair']}, {record['dtype']} on {record['device']}"


def distribution(record: Record) -> str:
    return "greedy" if record["temperature"] == 0 else f"temperature {record['temperature']:g}"
