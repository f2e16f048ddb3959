"""The shape of the package: imports go strictly downwards, and importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import specdec

ROOT = Path(specdec.__file__).parents[1]
# from the bottom to the top: a module imports from rooms below its own, and within its room without circles; a room is
# a module or a package, and the most specific name counts
ROOMS = {
    "specdec": [
        {"runtime", "servers", "sampling_params", "stats", "prompts", "texts"},
        {"kernels", "trees", "constraints"},
        {"sampling"},
        {"verification", "requests"},
        {"trees.verification", "synthetic", "lossy", "device_rows", "outcomes"},
        {"models"},
        {"heads"},
        {"proposers"},
        {"drafts", "decoding", "forced"},
        {"methods"},
        {"assembly"},
        {"engine"},
        {"__init__"},
        {"cli", "conformance", "distill"},
        {"__main__"},
    ],
    "bench": [
        {"records"},
        {"catalogue", "workloads"},
        {"engines"},
        {"campaign"},
        {"measure", "analysis"},
        {"report"},
        {"tools", "first_light"},
        {"conftest", "test_speedup", "test_load", "test_equivalence", "cost_sweep", "__init__"},
    ],
}


def modules(root: str) -> dict[str, Path]:
    """The files of a package by their dotted names."""
    found = {}
    for path in sorted((ROOT / root).rglob("*.py")):
        parts = path.relative_to(ROOT / root).with_suffix("").parts
        if not {"baselines", "workers"} & set(parts):
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(root: str, path: Path, known: Collection[str]) -> set[str]:
    """Modules of its package that a file imports, at its top or inside a function."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    named = {name for node in nodes for name in (node.module, *(f"{node.module}.{each.name}" for each in node.names))}
    inside = {name.removeprefix(f"{root}.") for name in named if name.startswith(f"{root}.")}
    modules_named = inside & set(known)
    return {name for name in modules_named if not any(other.startswith(f"{name}.") for other in modules_named)}


def height(root: str, name: str) -> int:
    """That of the most specific room that a module is in."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for floor, rooms in enumerate(ROOMS[root]):
            if ".".join(parts[:length]) in rooms:
                return floor
    raise AssertionError(f"{root}.{name} is in no room; decide where it lives")


@pytest.mark.parametrize("root", ROOMS)
def test_imports_go_downwards(root: str) -> None:
    files = modules(root)
    for name, path in files.items():
        upwards = {other for other in imports(root, path, files) if height(root, other) > height(root, name)}
        assert not upwards, f"{root}.{name} imports {upwards}, which are above it"


@pytest.mark.parametrize("root", ROOMS)
def test_imports_have_no_circles(root: str) -> None:
    files = modules(root)
    sorter = TopologicalSorter({name: imports(root, path, files) - {name} for name, path in files.items()})
    assert len([*sorter.static_order()]) == len(files)  # raises CycleError, which names them


@pytest.mark.parametrize("root", ROOMS)
def test_packages_define_nothing(root: str) -> None:
    """What a package's `__init__` holds is imports; the package itself names its version and imports on first use."""
    allowed = (ast.Expr, ast.Import, ast.ImportFrom)
    for path in (ROOT / root).rglob("*/__init__.py"):
        assert all(isinstance(node, allowed) for node in ast.parse(path.read_text()).body), path


def test_a_report_needs_neither_torch_nor_pytest() -> None:
    """Only the standard library and numpy: it is read where nothing else is installed, in under a second."""
    run = ROOT / "bench" / "baselines" / "engines-cpu.json"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "missing = ('torch', 'transformers', 'pytest', 'scipy', 'datasets', 'vllm', 'jinja2', 'matplotlib')\n"
        "sys.modules.update(dict.fromkeys(missing))\n"
        "from bench.report.rendering import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True, check=False)
    assert "speed-up" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "unloaded"),
    [
        ("import specdec", ("torch", "transformers", "scipy", "datasets", "vllm")),
        ("from specdec import Engine, SamplingParams", ("transformers", "scipy", "datasets", "vllm")),
    ],
)
def test_importing_specdec_loads_little(code: str, unloaded: tuple[str, ...]) -> None:
    code = f"{code}; import sys; print([m for m in {unloaded} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_public_names() -> None:
    assert specdec.__all__ == [
        "METHODS",
        "AcceptanceCounts",
        "CausalLM",
        "Chunk",
        "Completion",
        "Engine",
        "EngineBusyError",
        "PhaseTimes",
        "SamplingParams",
        "Seq2SeqLM",
        "Step",
    ]
    assert all(getattr(specdec, name) is not None for name in specdec.__all__)
