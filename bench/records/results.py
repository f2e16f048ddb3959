"""Reading runs: checked, and sorted by kind of cell."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.records import fields
from bench.records.schema import CELL_FIELDS, LEVELS, MAX_PARTS, SCHEMA_VERSION, Record
from bench.records.untrusted import harmless, loads
from specdec.runtime.printable import printable


@dataclass(frozen=True, slots=True)
class Results:
    """One run, or several shards of one.

    name: of its file, without the suffix. machine, date, commit: where and when it ran, and of which source ("" if
    unknown). command, configuration: None in files that do not record them. shard: (I, N) of --shard, or None.
    cells, loads, costs, certificates: records of decoding, of open-loop load, of the cost sweep and of audits.
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
        """All records, unknown fields included."""
        return [*self.cells, *self.loads, *self.costs, *self.certificates]

    @property
    def pictured(self) -> list[Record]:
        """Records that are shown in pictures."""
        return [*self.cells, *self.loads, *self.costs]

    @property
    def file_name(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^\w.-]+", "-", self.name)

    @property
    def engines(self) -> list[str]:
        """The engines of its cells, in their order."""
        return list(dict.fromkeys(str(record["engine"]) for record in (*self.cells, *self.loads)))

    @property
    def reference(self) -> str:
        """The engine that the others are compared with; "" if nothing was decoded."""
        return str(self.cells[0].get("reference_engine") or self.cells[0]["engine"]) if self.cells else ""

    @property
    def shortage(self) -> str:
        """Which parts of the campaign are missing; "" if none is."""
        missing = ", ".join(map(str, self.missing_shards))
        verb = "is" if len(self.missing_shards) == 1 else "are"
        parts = "part" if len(self.missing_shards) == 1 else "parts"
        return f"Not the whole campaign: {parts} {missing} of it {verb} missing" if missing else ""

    def described(self) -> str:
        """When, on what and with which versions, in a line; "" for a run that is not in a file yet."""
        machine = self.machine
        if not machine:
            return ""
        hardware = ", ".join(machine.get("gpus") or ()) or _processor(machine)
        versions = (f"{name} {version}" for name, version in (machine.get("versions") or {}).items() if version)
        return ", ".join([self.date[:10], hardware, f"Python {machine.get('python_version', '?')}", *versions])


def _processor(machine: dict[str, Any]) -> str:
    return f"{machine.get('cpu_count', '?')} cores of {machine.get('cpu_model') or 'a processor'}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read(path: Path) -> Results:
    """The run of a pytest-benchmark JSON file, or of the journal that an interrupted run leaves.

    Raises ValueError if these benchmarks did not write the file.
    """
    try:
        document = _of_journal(path) if path.suffix == ".jsonl" else loads(path.read_text(encoding="utf-8"))
        return _parse(printable(path.stem), document)
    except OSError as error:
        raise ValueError(f"{path} must be a file that can be read ({error.strerror}); check the path") from error
    except UnreadableError as error:
        raise ValueError(f"{path} {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} must be written by `pytest bench/ --benchmark-json`; {error!r} is invalid") from error


def _of_journal(path: Path) -> dict[str, Any]:
    """A journal in the form of a pytest-benchmark file, with the cells that it has so far."""
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
    """A file cannot be used; the message has the rule and the remedy."""


def of_records(records: Iterable[Record]) -> Results:
    """A run that is not in a file yet."""
    return Results("", {}, "", "", None, None, None, **_by_kind(map(complete, records)))


def _by_kind(records: Iterable[Record]) -> dict[str, Any]:
    listed = list(records)
    return {kind: tuple(each for each in listed if kind_of(each) == kind) for kind in fields.KINDS}


def _parse(name: str, document: dict[str, Any]) -> Results:
    benchmarks = document["benchmarks"]
    machine = document["machine_info"]
    if not benchmarks:
        raise UnreadableError("must have at least one finished cell, and has none; see why the run's cells failed")
    _check_schema(document.get("schema_version", benchmarks[0]["extra_info"].get("schema_version")))
    records = [_checked(_record(benchmark), benchmark.get("name", "?")) for benchmark in benchmarks]
    commit = (document.get("commit_info") or {}).get("id") or ""
    configuration, command = document.get("configuration"), document.get("command")
    shard = _shard(document.get("shard") or (configuration or {}).get("shard"))
    return Results(
        name,
        dict(machine),
        str(document["datetime"]),
        commit[:10],
        command,
        configuration,
        shard,
        **_by_kind(records),
        cells_of_shards=tuple(map(int, document.get("cells_of_shards") or ())),
    )


def _record(benchmark: dict[str, Any]) -> Record:
    """The record of a cell and the times of its rounds; parameters of an audit that its record lacks are added."""
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
    if not 1 <= index <= number <= MAX_PARTS:
        raise UnreadableError(f"must be of shard I/N with 1 <= I <= N <= {MAX_PARTS}, and is of {index}/{number}")
    return index, number


def kind_of(record: Record) -> str:
    """The kind of a record: one of `fields.KINDS`."""
    if record.get("axis") is not None:
        return "costs"
    if any(record.get(name) is not None for name in LEVELS):
        return "loads"
    return "certificates" if record.get("verdict") is not None else "cells"


def kind_name(record: Record) -> str:
    """The kind of a record in the singular, as in exported rows."""
    return kind_of(record).removesuffix("s")


def _checked(record: Record, name: str) -> Record:
    """The complete record. Raises UnreadableError if it cannot be shown."""
    kind = kind_of(record)
    if lacking := [each for each in fields.needed(kind) if each not in record]:
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
    """With the default of each declared field that a record lacks."""
    return {**{name: each.default for name, each in fields.FIELDS.items()}, **record}


def _is_sound(name: str, value: Any) -> bool:
    """Whether the value of a field that is declared as a number is one."""
    if value is None or fields.field(name).type not in (int, float):
        return True
    return isinstance(value, int | float) and math.isfinite(value)


def cell_id(record: Record) -> str:
    """The name of a record within a run."""
    if record.get("axis") is not None:
        return f"cost-{record['axis']}-{record['size']}"
    names = [str(record[name]) for name in (*CELL_FIELDS, "rate") if record.get(name) is not None]
    names += [f"{record['concurrency']}clients"] if record.get("concurrency") is not None else []
    return "-".join([*(["equivalence"] if record.get("verdict") is not None else []), *names])


def _is_header(line: Any) -> bool:
    return isinstance(line, dict) and "schema_version" in line and isinstance(line.get("configuration"), dict)


def _is_cell(line: Any) -> bool:
    if not (isinstance(line, dict) and isinstance(line.get("cell"), str) and isinstance(line.get("record"), dict)):
        return False
    rounds = line.get("rounds_s")
    return isinstance(rounds, list) and all(isinstance(each, int | float) and 0 <= each < math.inf for each in rounds)


def complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal and their number of bytes, without a last line that is incomplete."""
    content = path.read_bytes()
    num_bytes = content.rfind(b"\n") + 1
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(content[:num_bytes].splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not (_is_cell(line) if lines else _is_header(line)):
            raise ValueError(
                f"journal={path} must be JSON lines, but line {number} is damaged; leave out --resume to "
                "start over (the old journal is then kept)"
            )
        lines.append(line)
    return lines, num_bytes
