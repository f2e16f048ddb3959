"""The journal: nothing that was finished is lost, and nothing of another configuration is mixed in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from copy import copy
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from bench.campaign.config import BenchConfig
from bench.measure.journal import Entry, Journal
from bench.measure.session import Session

CONFIGURATION = {"seed": 0, "gammas": (2, 4)}
Opened = Callable[..., Journal]
ENTRY = Entry({"speedup": 1.5}, [0.1, 0.2])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new-folder" / "journal.jsonl"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Journal]]:
    """Open the journal at `path`, after the one opened before was closed."""
    with ExitStack() as stack:

        def open_(configuration: object = CONFIGURATION, place: Path = path, *, resume: bool) -> Journal:
            stack.close()
            return stack.enter_context(closing(Journal.open(place, configuration, resume=resume)))

        yield open_


def written(path: Path, *cells: str) -> Path:
    """A closed journal with these cells."""
    with closing(Journal.open(path, CONFIGURATION, resume=False)) as journal:
        for cell in cells:
            journal.append(cell, ENTRY)
    return path


def test_resuming_returns_finished_cells_and_continues(opened: Opened, path: Path) -> None:
    written(path, "a", "b")
    journal = opened(resume=True)
    assert journal.cells == {"a": ENTRY, "b": ENTRY}
    journal.append("c", ENTRY)
    assert set(opened(resume=True).cells) == {"a", "b", "c"}


def test_resuming_without_a_journal_starts_a_new_one(opened: Opened, path: Path) -> None:
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


def test_another_configuration_is_an_error_that_names_the_differences(opened: Opened, path: Path) -> None:
    content = written(path, "a").read_bytes()
    with pytest.raises(ValueError, match="seed was 0 and is 1, dtype was None and is 'float32'; repeat"):
        opened({"seed": 1, "gammas": [2, 4], "dtype": "float32"}, resume=True)
    assert path.read_bytes() == content


BESIDE = {  # what changes no result: where things are written, what is resumed, and how files are found
    *(
        "journal",
        "resume",
        "data_dir",
        "vllm_python",
        "openvino_python",
        "llama_server",
        "certificates",
        "command",
        "named",
    ),
}


def other(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return f"{value}x"
        case tuple():  # names of engines and methods must exist
            return value[:-1] if len(value) > 1 else (*value, "x")
        case Path():
            return value / "x"
        case frozenset():
            return value | {"x"}
        case None:
            return "x"
    return replace(value, **{fields(value)[0].name: other(getattr(value, fields(value)[0].name))})


@pytest.mark.parametrize("field", [field.name for field in fields(BenchConfig)])
def test_every_field_of_a_configuration_matters_but_those_listed(
    field: str, make_config: Callable[..., BenchConfig], path: Path
) -> None:
    """A cell of another dtype, for example, is not taken for this run's."""
    session = Session(make_config())
    before = session.configuration()
    Journal.open(path, before, resume=False).close()
    session.config = replace_unchecked(session.config, field)
    if field == "device":  # "auto" stands for one
        session.device = other(session.device)
    if field in BESIDE:
        assert session.configuration() == before
    else:
        with pytest.raises(ValueError, match=f"{field} was .* and is "):
            Journal.open(path, session.configuration(), resume=True)


def replace_unchecked(config: BenchConfig, field: str) -> BenchConfig:
    """With another value of a field, which need not make sense."""
    changed = copy(config)
    object.__setattr__(changed, field, other(getattr(config, field)))
    return changed


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
            Journal.open(path.with_name("other"), CONFIGURATION, resume=False)
        assert not path.with_name("other").exists()
    journal.append("c", ENTRY)
    assert set(opened(resume=True).cells) == {"a", "c"}


# ---- journals of other runs


def test_a_journal_is_one_runs_at_a_time(opened: Opened, path: Path, tmp_path: Path) -> None:
    """Under another name, too; the second run is refused before it writes anything."""
    opened(resume=False).append("a", ENTRY)
    content = path.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(path)
    for place, resume in product((path, tmp_path / "link.jsonl"), (False, True)):
        with pytest.raises(
            ValueError, match=r"must be used by one run at a time, but another run is writing it; wait until"
        ):
            Journal.open(place, CONFIGURATION, resume=resume)
    assert path.read_bytes() == content
    assert set(opened(resume=True).cells) == {"a"}  # it has ended


def test_a_killed_run_holds_no_journal(opened: Opened, path: Path) -> None:
    code = "import os, sys\nfrom pathlib import Path\nfrom bench.measure.journal import Journal\n"
    code += f"journal = Journal.open(Path(sys.argv[1]), {CONFIGURATION}, resume=False)\nos.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -9
    assert opened(resume=True).cells == {}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        "my thesis\n",
        "my thesis",
        '{"prompt": "Hello"}\n',
        "[1, 2]\n",
        '{"schema_version": 1}\n{}\n',
        "\n",
        "[" * 100_000 + "\n",
        '{"schema_version": 1, "configuration": 5}\n',
    ],
)
def test_a_file_that_is_no_journal_is_not_overwritten(opened: Opened, path: Path, content: str, resume: bool) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match="must be a journal or a new file, but holds something else; name another"):
        opened(resume=resume)
    assert path.read_text() == content


def test_an_empty_file_is_a_new_one(opened: Opened, path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert opened(resume=False).kept_as is None


def test_a_journal_of_another_version_is_not_resumed(opened: Opened, path: Path) -> None:
    content = written(path, "a").read_text().replace('"schema_version": 1', '"schema_version": 2', 1)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"must have schema_version=1 to be resumed, but has 2: another version of"):
        opened(resume=True)
    assert path.read_text() == content
    assert opened(resume=False).kept_as is not None


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "{}",
        "[" * 100_000,
        '{"cell": "b", "rounds_s": [0.1], "record": null}',
        '{"cell": "b", "rounds_s": ["0.1"], "record": {}}',
        '{"cell": "b", "rounds_s": [NaN], "record": {}}',
        '{"cell": 3, "rounds_s": [0.1], "record": {}}',
    ],
)
def test_a_line_of_another_shape_is_damage(opened: Opened, path: Path, line: str) -> None:
    content = written(path, "a").read_text() + line + "\n"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 3 is damaged; leave out --resume"):
        opened(resume=True)
    assert path.read_text() == content
