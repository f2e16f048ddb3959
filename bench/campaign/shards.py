"""Parts of a campaign for several machines.

A cell's part is derived from a hash of its id, so that adding other cells or changing their order does not move it to
another machine. Parts are only roughly equal; with few cells one may be empty. Cells that are compared with each other
share a part: the methods at one rate, and the cost sweep.
"""

from __future__ import annotations

import hashlib


def part_of(key: str, num_parts: int) -> int:
    """A cell's part, from 1 to `num_parts`. key: its id, or a key shared by cells that stay together."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_parts + 1


def parse(shard: str | None) -> tuple[int, int]:
    """(I, N) of `--shard I/N`; the whole is 1/1."""
    index, _, number = (shard or "1/1").partition("/")
    return int(index), int(number)
