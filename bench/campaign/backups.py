"""Earlier results that a new campaign keeps under another name."""

from __future__ import annotations

import os
from pathlib import Path


def rename_to_backup(path: Path) -> Path:
    """Rename a file or folder to the first free of NAME.bak, NAME.bak2, ...; returns the new path."""
    names = (f"{path.name}.bak{number if number > 1 else ''}" for number in range(1, 10_000))
    return path.rename(next(place for place in map(path.with_name, names) if not os.path.lexists(place)))
