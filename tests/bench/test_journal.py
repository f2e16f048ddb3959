"""The journal: nothing that was finished is lost, and nothing of another configuration is mixed in."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from bench.journal import Entry, Journal

CONFIGURATION = {"seed": 0, "gammas": (2, 4)}
Opened = Callable[..., Journal]
ENTRY = Entry({"speedup": 1.5}, [0.1, 0.2])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new-folder" / "journal.jsonl"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Journal]]:
    """Open the journal at `path`; every journal is closed at the end."""
    with ExitStack() as stack:
        yield lambda configuration=CONFIGURATION, place=path, *, resume: stack.enter_context(
            closing(Journal.open(place, configuration, resume=resume))
        )


def written(path: Path, *cells: str) -> Path:
    """A closed journal with these cells."""
    with closing(Journal.open(path, CONFIGURATION, resume=False)) as journal:
        for cell in cells:
            journal.append(cell, ENTRY)
    return path


def test_resuming_gives_back_what_was_finished_and_goes_on(opened: Opened, path: Path) -> None:
    written(path, "a", "b")
    journal = opened(resume=True)
    assert journal.cells == {"a": ENTRY, "b": ENTRY}
    journal.append("c", ENTRY)
    assert set(opened(resume=True).cells) == {"a", "b", "c"}


def test_resuming_nothing_begins_anew(opened: Opened, path: Path) -> None:
    assert opened(resume=True).cells == {}
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("num_bytes_lost", [1, 10])
def test_a_line_that_a_kill_cut_off_is_dropped(opened: Opened, path: Path, num_bytes_lost: int) -> None:
    os.truncate(written(path, "a", "b"), path.stat().st_size - num_bytes_lost)
    journal = opened(resume=True)
    assert set(journal.cells) == {"a"}
    journal.append("c", ENTRY)
    assert set(opened(resume=True).cells) == {"a", "c"}


def test_a_first_line_that_a_kill_cut_off_is_written_again(opened: Opened, path: Path) -> None:
    os.truncate(written(path), 5)
    opened(resume=True).append("a", ENTRY)
    assert set(opened(resume=True).cells) == {"a"}


def test_another_configuration_is_an_error_that_names_what_differs(opened: Opened, path: Path) -> None:
    content = written(path, "a").read_bytes()
    with pytest.raises(ValueError, match="seed was 0 and is 1, dtype was None and is 'float32'; repeat"):
        opened({"seed": 1, "gammas": [2, 4], "dtype": "float32"}, resume=True)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_an_error(opened: Opened, path: Path) -> None:
    content = written(path, "a", "b").read_text().replace('"cell": "a"', '"cell" "a"')
    path.write_text(content)
    with pytest.raises(ValueError, match="line 2 is damaged; leave out --resume"):
        opened(resume=True)


def test_an_old_journal_is_kept_unless_it_is_empty(opened: Opened, path: Path) -> None:
    contents = [written(path, cell).read_bytes() for cell in ("a", "b")]
    journal = opened(resume=False)
    assert journal.kept_as == path.with_name("journal.jsonl.bak2")
    assert [path.with_name(f"journal.jsonl.{end}").read_bytes() for end in ("bak", "bak2")] == contents
    assert opened(resume=False).kept_as is None


def test_a_full_disk_leaves_the_journal_whole(opened: Opened, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(path, "a")
    journal = opened(resume=True)
    content = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append("b", ENTRY)
        assert path.read_bytes() == content
        with pytest.raises(ValueError, match=r"must be writable \(No space left on device\); free space there"):
            opened(place=path.with_name("other"), resume=False)
        assert not path.with_name("other").exists()
    journal.append("c", ENTRY)
    assert set(opened(resume=True).cells) == {"a", "c"}
