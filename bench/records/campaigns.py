"""Shards of one campaign merged into one run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.records.fields import KINDS
from bench.records.results import Results, _short, cell_id, read
from bench.records.schema import LEVELS, Record
from bench.records.untrusted import loads


def read_all(paths: Sequence[Path]) -> list[Results]:
    """The runs of some files, in order; shards of one campaign are one run.

    Files are merged if they are shards (--shard), or if they have the same configuration and no cell in common, as
    parts of a run that were selected with -k.
    Raises ValueError for a file that these benchmarks did not write, for a cell that is in two shards, and for shards
    of different configurations.
    """
    return merge([read(path) for path in paths])


def read_folder(folder: Path) -> list[Results]:
    """The runs of a folder: each JSON file is one, and so are the files of each folder in it, as parts of a campaign.

    Raises ValueError as `read_all` does, and if there are no runs.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    campaigns = [sorted(each.glob("*.json")) if each.is_dir() else [each] for each in entries]
    runs = [run for paths in campaigns if paths and paths[0].suffix == ".json" for run in read_all(paths)]
    if not runs:
        raise ValueError(f"{folder} must be a folder with files from `pytest bench/ --benchmark-json`; it has none")
    return runs


def merge(runs: Sequence[Results]) -> list[Results]:
    """Shards of one campaign as one run, in the place of the first of them; see `read_all`."""
    campaigns: list[list[Results]] = []
    for run in runs:
        campaign = next((campaign for campaign in campaigns if _belongs(run, campaign)), None)
        campaigns.append([run]) if campaign is None else campaign.append(run)
    merged = [_union(campaign) for campaign in campaigns]
    _check_complete(merged)
    return merged


def _belongs(run: Results, campaign: Sequence[Results]) -> bool:
    """Whether a run belongs to the campaign of others."""
    first = campaign[0]
    if run.configuration is None or first.configuration is None or differing(first, run):
        return False
    if run.shard and first.shard:
        return run.shard[1] == first.shard[1]
    known = {cell_id(record) for other in campaign for record in other.records}
    return not run.shard and not first.shard and known.isdisjoint(map(cell_id, run.records))


def joined_files(paths: Sequence[Path], command: str) -> dict[str, Any]:
    """The files of all parts of a campaign as the file of one run. command: that repeats it.

    Raises ValueError as `read_all` does, and if they are not all parts of one campaign.
    """
    run, *others = read_all(paths)
    if others or run.missing_shards:
        reason = run.shortage or f"they are of {1 + len(others)} campaigns"
        raise ValueError(f"{', '.join(map(str, paths))} must be all parts of one campaign. {reason}")
    documents: list[dict[str, Any]] = [loads(path.read_text(encoding="utf-8")) for path in paths]
    first = documents[0]
    return first | {
        "benchmarks": [each for document in documents for each in document["benchmarks"]],
        "machine_info": max((each["machine_info"] for each in documents), key=lambda each: len(each.get("gpus") or ())),
        "datetime": min(document["datetime"] for document in documents),
        "configuration": first["configuration"] | {"shard": None},
        "command": command,
        "shard": None,
        "cells_of_shards": [sum(first["cells_of_shards"])],
    }


def differing(before: Results, after: Results) -> list[str]:
    """Options and circumstances in which two runs differ, with both values; except for the shard."""
    old, new = (run.configuration or {} for run in (before, after))
    keys = sorted({*old, *new} - {"shard"})
    return [
        f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _union(campaign: Sequence[Results]) -> Results:
    """Several runs as one. Raises ValueError for a cell that is in two of them."""
    first = campaign[0]
    owners: dict[str, str] = {}
    for run in campaign:
        for name in map(cell_id, run.records):
            if name in owners:
                where = f"both {owners[name]} and {run.name}" if owners[name] != run.name else f"{run.name} twice"
                raise ValueError(
                    f"cell {name} must be in one file of a campaign, and is in {where}; "
                    "leave one of them out, or give each shard once"
                )
            owners[name] = run.name
    if len(campaign) == 1:
        return replace(first, missing_shards=_missing(first, {first.shard[0] if first.shard else 1}))
    kinds: dict[str, Any] = {
        kind: _ordered([record for run in campaign for record in getattr(run, kind)]) for kind in KINDS
    }
    whole = replace(first, name=_joined([run.name for run in campaign]), **kinds)
    return replace(whole, missing_shards=_missing(first, {run.shard[0] for run in campaign if run.shard}))


def _ordered(records: Sequence[Record]) -> tuple[Record, ...]:
    """In the order that a single run has: cells that are compared are adjacent."""
    names = ("pair", "placement", "workload", "batch_size", "engine", "axis", "method")
    places = {name: list(dict.fromkeys(str(record.get(name)) for record in records)) for name in names}

    def place(record: Record) -> tuple[float, ...]:
        *before, method = (places[name].index(str(record.get(name))) for name in names)
        numbers = [record.get(name) for name in (*LEVELS, "gamma", "size")]
        is_plain = record.get("method") == "autoregressive"
        sizes = [float(each) if isinstance(each, int | float) else math.inf for each in numbers]
        return (*before, not is_plain, method, *sizes)

    return tuple(sorted(records, key=place))


def _missing(run: Results, shards: Collection[int]) -> tuple[int, ...]:
    """Shards of a run's campaign that are missing; a shard without cells writes no file."""
    _, number = run.shard or (1, 1)
    cells = run.cells_of_shards if len(run.cells_of_shards) == number else (1,) * number
    return tuple(index for index in range(1, number + 1) if index not in shards and cells[index - 1])


def _joined(names: Sequence[str]) -> str:
    """The common start of the shards' names, and how many there are."""
    common = next(_common_starts(names)).rstrip("-_. 0123456789")
    return f"{common or names[0]}, {len(names)} shards"


def _common_starts(names: Sequence[str]) -> Iterator[str]:
    shortest = min(names, key=len)
    for length in range(len(shortest), -1, -1):
        if all(name.startswith(shortest[:length]) for name in names):
            yield shortest[:length]


def _check_complete(runs: Sequence[Results]) -> None:
    """Raises ValueError if shards with the same number of parts were not merged, naming what they differ in."""
    incomplete = [run for run in runs if run.missing_shards]
    for first, second in pairwise(incomplete):
        if first.shard and second.shard and first.shard[1] == second.shard[1] and first.shard != second.shard:
            raise ValueError(
                f"{first.name} and {second.name} must be shards of one campaign, but "
                f"{'; '.join(differing(first, second)) or 'their configurations are not recorded'}; "
                "measure one again with the other's options, or report each alone"
            )
