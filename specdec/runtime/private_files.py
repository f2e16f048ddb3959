"""Files that are trusted later: code and weights in a cache folder, which nobody but their user may have written.

What others can write, be it a folder further up, they can replace by files of their own, which would then run or speak
as whoever loads them.
"""

from __future__ import annotations

import hashlib
import os
import stat
from functools import cache
from pathlib import Path


def check_private(path: Path) -> None:
    """Check that nobody but this process's user and root can have changed a file or folder, or its name.

    Every folder up to it counts. One that does not exist yet is nobody's. Raises PermissionError saying which and why.
    """
    if not hasattr(os, "geteuid"):  # Windows has other means, and a cache below each user's own folder
        return
    for part in (path, *path.parents, *(real := path.resolve()).parents, real):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{part} belongs to another user, uid {found.st_uid}")
        shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # as /tmp
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared and not stat.S_ISLNK(found.st_mode):
            raise PermissionError(f"{part} can be written by others (chmod go-w would end that)")


def make_private_folder(folder: Path) -> None:
    """Make a folder, and those above it that do not exist, for this user alone. Raises OSError as `check_private`."""
    check_private(folder)
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def close_off(folder: Path) -> None:
    """Let nobody else into a folder, nor write its files, whatever the umask was when they were made."""
    for file in folder.iterdir():
        file.chmod(stat.S_IMODE(file.stat().st_mode) & ~0o022)
    folder.chmod(0o700)


def sha256(file: Path) -> str:
    """In hexadecimal; of a file that has not changed since it was read before it is known."""
    found = file.stat()
    return _sha256(file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@cache
def _sha256(file: Path, *version: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
