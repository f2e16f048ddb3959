"""Parts of a campaign for several machines.

A cell's part is derived from a hash of its id, so that adding other cells or changing their order does not move it to
another machine. Parts are only roughly equal; with few cells one may be empty. Cells that are compared with each other
share a part: the methods at one rate, and the cost sweep. With --shard-by pair a part is instead the cells of whole
pairs, in one placement each.
"""

from __future__ import annotations

import hashlib
from itertools import product

from bench.campaign.config import BenchConfig
from bench.records.schema import Cell


def part_of(key: str, num_parts: int) -> int:
    """A cell's part, from 1 to `num_parts`. key: its id, or a key shared by cells that stay together."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_parts + 1


def part_of_cell(cell: Cell, config: BenchConfig, prefix: str = "") -> int:
    """A cell's part of the campaign of a command. prefix: tells apart cells of several kinds with one id."""
    _, num_parts = parse(config.shard)
    if config.shard_by == "pair":
        return models_of(config).index((cell.pair, cell.placement)) % num_parts + 1
    return part_of(prefix + (cell.sweep_key if config.sweep else cell.shard_key), num_parts)


def models_of(config: BenchConfig) -> list[tuple[str, str]]:
    """(pair, placement) of everything that is loaded, in the order of the run."""
    return list(product([pair.name for pair in config.pairs], config.placements))


def parse(shard: str | None) -> tuple[int, int]:
    """(I, N) of `--shard I/N`; the whole is 1/1."""
    index, _, number = (shard or "1/1").partition("/")
    return int(index), int(number)
