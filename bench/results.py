"""Runs as they were written: read, checked, sorted by what was measured, and shards of one campaign put together."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.cells import CELL_FIELDS
from bench.columns import COLUMNS
from bench.foreign import harmless, loads, printable
from bench.journal import SCHEMA_VERSION, complete_lines
from bench.shards import MOST_PARTS

Record = dict[str, Any]
# fields that records had not always, with what held before they were told
LATER_FIELDS = {"prompt_format": "instruct", "quantisation": "none", "placement": "same"}
LISTS = (
    "acceptance_rate_at",
    "synthetic_acceptance_rates",
    *(f"{arm}per_prompt_{name}" for arm in ("", "baseline_", "reference_") for name in ("latency_s", "tokens")),
)
# what a record cannot be shown without, by what was measured
NEEDED = {
    "cells": (*CELL_FIELDS, "dtype", "device", "temperature", "num_prompts", "latency_s", "throughput_tok_s"),
    "loads": (
        *(*CELL_FIELDS, "dtype", "device", "temperature", "max_tokens", "rate", "arrivals", "duration_s", "drain_s"),
        *("ttft_limit_s", "inter_token_limit_s", "num_requests", "num_finished", "goodput", "within_limits_rate"),
        *("throughput_tok_s", "mean_num_in_flight"),
    ),
    "costs": ("axis", "size", "tokens", "median_s", "pair", "dtype", "device"),
    "certificates": ("verdict", "p_value"),
}


@dataclass(frozen=True, slots=True)
class Results:
    """One run, or several shards of one.

    name: of its file, without the ending. machine, date, commit: where and when it ran, and of which source ("" if that
    is not known). command, configuration: how; None in files that do not tell. shard: (I, N) of --shard, or None.
    cells, loads, costs, certificates: records of what was decoded, of open-loop load, of the cost sweep, of audits.
    """

    name: str
    machine: dict[str, Any]
    date: str
    commit: str
    command: str | None
    configuration: dict[str, Any] | None
    shard: tuple[int, int] | None
    cells: tuple[Record, ...] = ()
    loads: tuple[Record, ...] = ()
    costs: tuple[Record, ...] = ()
    certificates: tuple[Record, ...] = ()
    cells_of_shards: tuple[int, ...] = ()
    missing_shards: tuple[int, ...] = ()

    @property
    def records(self) -> list[Record]:
        """All of them, as measured: unknown fields included."""
        return [*self.cells, *self.loads, *self.costs, *self.certificates]

    @property
    def pictured(self) -> list[Record]:
        """Those that there are pictures of."""
        return [*self.cells, *self.loads, *self.costs]

    @property
    def file_name(self) -> str:
        """The name as part of a file's."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def engines(self) -> list[str]:
        """Those of its cells, in their order."""
        return list(dict.fromkeys(str(record["engine"]) for record in (*self.cells, *self.loads)))

    @property
    def reference(self) -> str:
        """The engine that the others are compared with; "" if nothing was decoded."""
        return str(self.cells[0].get("reference_engine") or self.cells[0]["engine"]) if self.cells else ""

    @property
    def shortage(self) -> str:
        """That parts of the campaign are missing, and which; "" if none is."""
        told = ", ".join(map(str, self.missing_shards))
        verb = "is" if len(self.missing_shards) == 1 else "are"
        parts = "part" if len(self.missing_shards) == 1 else "parts"
        return f"Not the whole campaign: {parts} {told} of it {verb} missing" if told else ""

    def described(self) -> str:
        """When, on what and with which versions, in a line."""
        machine = self.machine
        hardware = ", ".join(machine.get("gpus") or ()) or _processor(machine)
        versions = (f"{name} {version}" for name, version in (machine.get("versions") or {}).items() if version)
        return ", ".join([self.date[:10], hardware, f"Python {machine.get('python_version', '?')}", *versions])


def _processor(machine: dict[str, Any]) -> str:
    return f"{machine.get('cpu_count', '?')} cores of {machine.get('cpu_model') or 'a processor'}"


def read_all(paths: Sequence[Path]) -> list[Results]:
    """The runs of some files, in order; shards of one campaign are one run.

    Files are put together if they say so themselves (--shard), or if they are of one configuration and have no cell in
    common, as parts of a run that were chosen with -k.
    Raises ValueError for a file that is none of these benchmarks', for a cell that two shards have, and for shards of
    different configurations.
    """
    return merge([read(path) for path in paths])


def read(path: Path) -> Results:
    """The run of a pytest-benchmark JSON file, or of a journal, which a run that was cut off leaves.

    Raises ValueError if the file holds none of these benchmarks'.
    """
    try:
        document = _of_journal(path) if path.suffix == ".jsonl" else loads(path.read_text(encoding="utf-8"))
        return _parse(printable(path.stem), document)
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read ({error.strerror}); check the path") from error
    except UnreadableError as error:
        raise ValueError(f"{path} {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} must be written by `pytest bench/ --benchmark-json`; {error!r} is amiss") from error


def _of_journal(path: Path) -> dict[str, Any]:
    """A journal in the form of a pytest-benchmark file, as far as it goes."""
    first, *cells = harmless(complete_lines(path)[0]) or [{}]
    configuration = first["configuration"]
    return {
        "schema_version": first["schema_version"],
        "configuration": configuration,
        "datetime": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(),
        "machine_info": {name: configuration.get(name) for name in ("versions", "cpu_model", "cpu_count")},
        "benchmarks": [
            {"name": line["cell"], "extra_info": line["record"], "stats": {"data": line["rounds_s"]}}
            for line in cells
            if line["cell"] != "roofline"
        ],
    }


class UnreadableError(Exception):
    """What is amiss with a file, the rule and the remedy."""


def _parse(name: str, document: dict[str, Any]) -> Results:
    benchmarks = document["benchmarks"]
    machine = document["machine_info"]
    if not benchmarks:
        raise UnreadableError("must have at least one finished cell, and has none; see why the run's cells failed")
    _check_schema(document.get("schema_version", benchmarks[0]["extra_info"].get("schema_version")))
    kinds: dict[str, list[Record]] = {kind: [] for kind in NEEDED}
    for benchmark in benchmarks:
        record = _record(benchmark)
        kinds[kind_of(record)].append(_checked(record, benchmark.get("name", "?")))
    commit = (document.get("commit_info") or {}).get("id") or ""
    configuration, command = document.get("configuration"), document.get("command")
    shard = _shard(document.get("shard") or (configuration or {}).get("shard"))
    told = {kind: tuple(records) for kind, records in kinds.items()}
    told["cells_of_shards"] = tuple(map(int, document.get("cells_of_shards") or ()))
    return Results(name, dict(machine), str(document["datetime"]), commit[:10], command, configuration, shard, **told)


def _record(benchmark: dict[str, Any]) -> Record:
    """What a cell wrote, with what an audit's record leaves to the cell's parameters, and the times of its rounds."""
    record = benchmark["extra_info"]
    rounds_s = (benchmark.get("stats") or {}).get("data")
    parameters = (benchmark.get("params") or {}) if "verdict" in record else {}
    return {**parameters, **record, "per_round_s": rounds_s}


def _check_schema(version: Any) -> None:
    if version != SCHEMA_VERSION:
        remedy = "measure again" if not isinstance(version, int) or version < SCHEMA_VERSION else "use a newer specdec"
        raise UnreadableError(
            f"must be written by `pytest bench/ --benchmark-json` with schema_version={SCHEMA_VERSION}, and has "
            f"{version}; {remedy}"
        )


def _shard(text: Any) -> tuple[int, int] | None:
    """ "2/3" or [2, 3]."""
    if not text:
        return None
    index, number = map(int, text.split("/") if isinstance(text, str) else text)
    if not 1 <= index <= number <= MOST_PARTS:
        raise UnreadableError(f"must be of shard I/N with 1 <= I <= N <= {MOST_PARTS}, and is of {index}/{number}")
    return index, number


def kind_of(record: Record) -> str:
    """What a record is of: one of NEEDED."""
    if record.get("axis") is not None:
        return "costs"
    if record.get("rate") is not None:
        return "loads"
    return "certificates" if record.get("verdict") is not None else "cells"


def _checked(record: Record, name: str) -> Record:
    """Complete. Raises UnreadableError for what cannot be shown."""
    kind = kind_of(record)
    if lacking := [each for each in NEEDED[kind] if each not in record and each not in LATER_FIELDS]:
        raise UnreadableError(f"must be whole, but cell {name} lacks {', '.join(lacking)}; measure it again")
    if kind == "certificates":
        return record
    for each in record:
        if not _is_sound(each, record[each]):
            raise UnreadableError(
                f"must be whole, but in cell {name} {each}={_short(record[each])} is no number; measure it again"
            )
    return complete(record)


def complete(record: Record) -> Record:
    """With None for known fields that a record lacks, or what held before they were told."""
    return {**dict.fromkeys((*COLUMNS, *LISTS)), **LATER_FIELDS, **record}


def _is_sound(name: str, value: Any) -> bool:
    """Whether a field that is known to be a number is one, or is not known."""
    if name not in COLUMNS or not COLUMNS[name].unit or name in ("gamma", "prompt_lengths"):
        return True
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def cell_id(record: Record) -> str:
    """What names a record within a run."""
    if record.get("axis") is not None:
        return f"cost-{record['axis']}-{record['size']}"
    names = [str(record[name]) for name in (*CELL_FIELDS, "rate") if record.get(name) is not None]
    return "-".join([*(["equivalence"] if record.get("verdict") is not None else []), *names])


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
    """Whether a run goes on with what others began."""
    first = campaign[0]
    if run.configuration is None or first.configuration is None or differing(first, run):
        return False
    if run.shard and first.shard:
        return run.shard[1] == first.shard[1]
    known = {cell_id(record) for other in campaign for record in other.records}
    return not run.shard and not first.shard and known.isdisjoint(map(cell_id, run.records))


def differing(before: Results, after: Results) -> list[str]:
    """Options and circumstances in which two runs differ, with both values; shards apart."""
    ours, theirs = (run.configuration or {} for run in (before, after))
    keys = sorted({*ours, *theirs} - {"shard"})
    return [
        f"{key} was {_short(ours.get(key))} and is {_short(theirs.get(key))}"
        for key in keys
        if ours.get(key) != theirs.get(key)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _union(campaign: Sequence[Results]) -> Results:
    """One run of several. Raises ValueError for a cell that two of them have."""
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
    kinds = {kind: _ordered([record for run in campaign for record in getattr(run, kind)]) for kind in NEEDED}
    whole = replace(first, name=_joined([run.name for run in campaign]), **kinds)
    return replace(whole, missing_shards=_missing(first, {run.shard[0] for run in campaign if run.shard}))


def _ordered(records: Sequence[Record]) -> tuple[Record, ...]:
    """As one run would have had them: what is compared stands together."""
    names = ("pair", "placement", "workload", "batch_size", "engine", "axis", "method")
    places = {name: list(dict.fromkeys(str(record.get(name)) for record in records)) for name in names}

    def place(record: Record) -> tuple[float, ...]:
        *before, method = (places[name].index(str(record.get(name))) for name in names)
        numbers = [record.get(name) for name in ("rate", "gamma", "size")]
        is_plain = record.get("method") == "autoregressive"
        sizes = [float(each) if isinstance(each, int | float) else math.inf for each in numbers]
        return (*before, not is_plain, method, *sizes)

    return tuple(sorted(records, key=place))


def _missing(run: Results, shards: Collection[int]) -> tuple[int, ...]:
    """Parts of a run's campaign that are not among some; a part without a cell writes no file."""
    _, number = run.shard or (1, 1)
    cells = run.cells_of_shards if len(run.cells_of_shards) == number else (1,) * number
    return tuple(index for index in range(1, number + 1) if index not in shards and cells[index - 1])


def _joined(names: Sequence[str]) -> str:
    """What the names of shards have in common, and how many there are."""
    common = next(_common_starts(names)).rstrip("-_. 0123456789")
    return f"{common or names[0]}, {len(names)} shards"


def _common_starts(names: Sequence[str]) -> Iterator[str]:
    shortest = min(names, key=len)
    for length in range(len(shortest), -1, -1):
        if all(name.startswith(shortest[:length]) for name in names):
            yield shortest[:length]


def _check_complete(runs: Sequence[Results]) -> None:
    """Shards that lack others, while there are other shards, are of one campaign that was not one.

    Raises ValueError naming what they differ in.
    """
    incomplete = [run for run in runs if run.missing_shards]
    for first, second in pairwise(incomplete):
        if first.shard and second.shard and first.shard[1] == second.shard[1] and first.shard != second.shard:
            raise ValueError(
                f"{first.name} and {second.name} must be shards of one campaign, but "
                f"{'; '.join(differing(first, second)) or 'they do not tell their configurations'}; "
                "measure one again with the other's options, or report each alone"
            )
