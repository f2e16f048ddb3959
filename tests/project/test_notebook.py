"""The lesson runs from its first cell to its last, and what is committed of it is what it gives."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.font_manager  # builds its cache here: in the kernel it would print a message
import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "docs" / "speculative_decoding.ipynb"
NOT_FOR_THE_PUBLIC = (r"/(home|root|work|tmp|usr|Users)/", r"\bTraceback\b", r"\bWarning\b", r"0x[0-9a-f]{8}")
MAX_BYTES = 400_000
PROGRESS_BAR = "application/vnd.jupyter.widget-view+json"


def outputs(notebook: nbformat.NotebookNode) -> list[list[list[str]]]:
    """What kinds of output each code cell has: streams by name, others by their MIME types.

    Progress bars do not count: the first load on a machine converts the model and shows one, later loads do not.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds = [
        [[each.name] if "name" in each else sorted(each.get("data", {"error": 0})) for each in cell.outputs]
        for cell in cells
    ]
    return [[each for each in cell if PROGRESS_BAR not in each] for cell in kinds]


def committed() -> nbformat.NotebookNode:
    return nbformat.read(LESSON, as_version=4)


@pytest.mark.slow
def test_it_runs_from_a_fresh_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """No error, nothing on stderr, and in each cell the kinds of output that are committed."""
    assert matplotlib.font_manager.fontManager.ttflist
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = committed()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(LESSON.parent)}}).execute()
    assert outputs(notebook) == outputs(committed())


def test_the_committed_notebook_was_run_in_order_without_warnings() -> None:
    notebook = committed()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for cell in outputs(notebook) for each in cell for kind in each}
    assert kinds == {"stdout", "text/plain", "text/html", "image/png"}


def test_committed_outputs_do_not_identify_the_machine() -> None:
    assert LESSON.stat().st_size < MAX_BYTES
    notebook = committed()
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(not cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        texts = [
            each.get("text", "") + str(each.get("data", {}).get("text/html", "")) for each in cell.get("outputs", [])
        ]
        for pattern in NOT_FOR_THE_PUBLIC:
            assert not any(re.search(pattern, text) for text in texts), pattern
