"""Groups of records: by identity, those that drafted, and the fastest of each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.records.schema import CELL_FIELDS, Record

WITHOUT_ENGINE = ("pair", "workload", "batch_size", "placement")
BLOCK = (*WITHOUT_ENGINE, "engine")


def drafting(cells: Iterable[Record]) -> list[Record]:
    """Cells that were compared with plain decoding."""
    return [cell for cell in cells if cell["speedup"] is not None]


def fastest(cells: Sequence[Record]) -> list[Record]:
    """The cell with the highest speed-up of each engine and method, in the order of the run."""
    groups = grouped(drafting(cells), *(name for name in CELL_FIELDS if name != "gamma"))
    return [max(group, key=lambda cell: cell["speedup"]) for group in groups.values()]


def round_clusters(record: Record) -> list[int] | None:
    """The cluster of each round of a cell; None if conversations are not known: then rounds count as independent."""
    conversations, size = record.get("per_prompt_conversation"), record["batch_size"]
    return clusters_of_batches(conversations, size) if conversations else None


def clusters_of_batches(conversations: Sequence[int], batch_size: int) -> list[int]:
    """The cluster of each batch of prompts: those that share a conversation, directly or through others, are one.

    conversations: the number of each prompt's.
    """
    batches = [set(conversations[first : first + batch_size]) for first in range(0, len(conversations), batch_size)]
    cluster_of = {each: each for each in conversations}
    for batch in batches:
        joined = {cluster_of[each] for each in batch}
        cluster_of = {each: min(joined) if its in joined else its for each, its in cluster_of.items()}
    return [cluster_of[min(batch)] for batch in batches]


def grouped(records: Iterable[Record], *names: str) -> dict[Any, list[Record]]:
    """By the value of a field, or the values of several."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        values = tuple(record.get(name) for name in names)
        groups.setdefault(values if len(names) > 1 else values[0], []).append(record)
    return groups
