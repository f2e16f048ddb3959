"""Checks that cached code and weights could only have been written by the user who loads them.

Anyone who can write to a file or to one of its parent folders can replace it, and it would then run with the
permissions of the user who loads it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from functools import cache
from pathlib import Path


def check_private(path: Path) -> None:
    """Check that only this process's user and root can have changed a file or folder, or any of its parents.

    Folders that do not exist yet pass. Raises PermissionError naming the folder and the reason.
    """
    if not hasattr(os, "geteuid"):  # Windows has other permissions, and keeps the cache below the user's folder
        return
    for part in (path, *path.parents, *(real := path.resolve()).parents, real):
        try:
            found = part.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            raise PermissionError(f"{part} belongs to another user, uid {found.st_uid}")
        shared = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX  # sticky, like /tmp
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not shared and not stat.S_ISLNK(found.st_mode):
            raise PermissionError(f"{part} is writable by others; run chmod go-w on it")


def make_private_folder(folder: Path) -> None:
    """Create a folder and its missing parents for this user only. Raises OSError like `check_private`."""
    check_private(folder)
    for part in (*reversed(folder.parents), folder):
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    check_private(folder)


def close_off(folder: Path) -> None:
    """Deny others access to a folder and write access to its files, whatever the umask was."""
    for file in folder.iterdir():
        file.chmod(stat.S_IMODE(file.stat().st_mode) & ~0o022)
    folder.chmod(0o700)


def sha256(file: Path) -> str:
    """SHA-256 in hexadecimal, cached while the file does not change."""
    found = file.stat()
    return _sha256(file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@cache
def _sha256(file: Path, *version: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
