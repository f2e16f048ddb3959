"""The journal: JSON lines, first the configuration, then a line for each cell, written as soon as it is finished.

An interrupted run loses only the cell that was running; --resume takes the others from the journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from bench.campaign.backups import rename_to_backup
from bench.records.results import _is_header, complete_lines
from bench.records.schema import HEAD, SCHEMA_VERSION


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished cell: its record and the wall times of its rounds in seconds."""

    record: dict[str, Any]
    rounds_s: list[float]


class Journal:
    """An open journal, locked against other runs.

    cells: finished cells by id. kept_as: the new name of an earlier journal, if there was one.
    """

    def __init__(
        self, path: Path, stream: FileIO, lock: BaseFileLock, cells: dict[str, Entry], kept_as: Path | None = None
    ) -> None:
        self.path, self.cells, self.kept_as = path, cells, kept_as
        self._stream, self._lock = stream, lock

    @classmethod
    def open(cls, path: Path, configuration: Mapping[str, Any], *, resume: bool) -> Journal:
        """The journal at `path`, for this configuration.

        resume: continue an existing journal, or begin a new one if there is none. Without it an existing journal
        that has finished cells is renamed to the first free of NAME.bak, NAME.bak2, ...
        Raises ValueError if the journal cannot be written, is locked by another run, is not a journal, or is to be
        resumed but is damaged or of another configuration or version.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise ValueError(f"journal={path} must be a regular file; name another with --journal")
            lock = _locked(path)
            try:
                _check_header(path)
                if resume and path.exists() and path.stat().st_size:
                    return cls._continue(path, lock, configuration)
                kept_as = _keep(path)
                return cls(path, path.open("wb", buffering=0), lock, {}, kept_as)._begin(configuration)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            raise ValueError(
                f"journal={path} must be writable ({error.strerror}); free space there, or name another "
                "file with --journal"
            ) from error

    @classmethod
    def _continue(cls, path: Path, lock: BaseFileLock, configuration: Mapping[str, Any]) -> Journal:
        lines, num_bytes = complete_lines(path)
        if not lines:  # the run was killed while writing the first line
            num_bytes = 0
        elif (version := lines[0]["schema_version"]) != SCHEMA_VERSION:
            raise ValueError(
                f"journal={path} must have schema_version={SCHEMA_VERSION} to be resumed, but has {version!r}: another "
                "version of the benchmarks wrote it; use that one, or omit --resume to start over (the old journal "
                "is then kept)"
            )
        elif differing := _differing(lines[0]["configuration"], configuration):
            raise ValueError(
                f"journal={path} must have this configuration to be resumed, but {differing}; repeat that "
                "command line, or omit --resume to start over (the old journal is then kept)"
            )
        cells = {line["cell"]: Entry(line["record"], line["rounds_s"]) for line in lines[1:]}
        stream = path.open("r+b", buffering=0)
        stream.truncate(num_bytes)
        stream.seek(num_bytes)
        journal = cls(path, stream, lock, cells)
        return journal if lines else journal._begin(configuration)

    def _begin(self, configuration: Mapping[str, Any]) -> Journal:
        """Write the first line; on failure the file is removed."""
        try:
            self._write({"schema_version": SCHEMA_VERSION, "configuration": dict(configuration)})
        except OSError:
            self.close()
            self.path.unlink()
            raise
        return self

    def append(self, cell: str, entry: Entry) -> None:
        """Write a finished cell and sync it to the disk. Raises OSError, leaving the file unchanged."""
        self._write({"cell": cell, "rounds_s": entry.rounds_s, "record": entry.record})
        self.cells[cell] = entry

    def close(self) -> None:
        self._stream.close()
        self._lock.release()

    def _write(self, line: Mapping[str, Any]) -> None:
        end = self._stream.tell()
        content = json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            while content:
                content = content[self._stream.write(content) :]
            os.fsync(self._stream.fileno())
        except OSError:
            self._stream.seek(end)
            self._stream.truncate()  # part of the line may have been written before the disk was full
            raise


def _locked(path: Path) -> BaseFileLock:
    """A lock on a journal, links resolved, held until the run ends. Raises ValueError if another run holds it."""
    real = path.resolve()
    lock = FileLock(real.with_name(f"{real.name}.lock"), timeout=0)
    try:
        return lock.acquire().lock
    except Timeout:
        raise ValueError(
            f"journal={path} must be used by one run at a time, but another run is writing it; wait until it ends, or "
            "name another file with --journal"
        ) from None


def _check_header(path: Path) -> None:
    """Raise ValueError for a file that is not a journal and would be overwritten; a truncated header is accepted."""
    start = b""
    if path.exists():
        with path.open("rb") as stream:
            start = stream.readline()
    try:
        is_journal = _is_header(json.loads(start)) if start.endswith(b"\n") else start.startswith(HEAD[: len(start)])
    except (ValueError, RecursionError):
        is_journal = False
    if not is_journal:
        raise ValueError(f"journal={path} must be a journal or a new file, but holds something else; name another file")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The keys in which two configurations differ, with both values; empty if there are none."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in keys)


def _keep(path: Path) -> Path | None:
    """Rename a journal that has finished cells."""
    if not path.exists() or path.read_bytes().count(b"\n") < 2:
        return None
    return rename_to_backup(path)
