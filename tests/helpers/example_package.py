"""The example package of docs/extending.md, as a reader of that page would make it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
FILE = re.compile(r'^```\w+ title="(?P<path>[^"]+)"\n(?P<text>.*?)^```$', re.MULTILINE | re.DOTALL)


def write(folder: Path) -> Path:
    """Write the files of the page into a folder, which is returned."""
    for file in FILE.finditer(PAGE.read_text()):
        path = folder / file["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(file["text"])
    return folder


def install(source: Path, site: Path) -> None:
    """Install a package from its sources into a folder, from nothing but what this environment has."""
    arguments = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(source)]
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
