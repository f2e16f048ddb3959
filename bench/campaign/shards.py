"""Parts of a campaign for several machines.

A cell's part is a digest of its id, so that neither the order of cells nor another gamma, method or workload beside it
moves it to another machine. Parts are therefore only about equally large: of few cells one may have many, or none. What
is compared between cells stays together: the methods at one rate, and the cost sweep.
"""

from __future__ import annotations

import hashlib


def part_of(key: str, num_parts: int) -> int:
    """The part that a cell belongs to, from 1 to `num_parts`. key: its id, or what those that stay together share."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_parts + 1


def parse(shard: str | None) -> tuple[int, int]:
    """(I, N) of `--shard I/N`; the whole is 1/1."""
    index, _, number = (shard or "1/1").partition("/")
    return int(index), int(number)
