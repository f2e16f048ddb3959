"""The shape of the package: imports go strictly downwards, and importing it is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import specdec

ROOT = Path(specdec.__file__).parent
# from the bottom to the top; a module may import from layers below its own only
LAYERS = [
    {"checks", "fallbacks", "json_files", "methods", "private_files", "sampling_params"},
    {"texts", "stats", "wheels", "prompts", "progress", "timing", "devices", "constraints", "vocabularies"},
    {"models.placement"},
    {"kernels", "kernels.triton_clock", "kernels.triton_layers", "kernels.triton_sampling", "recording", "trees"},
    {"bans", "sampling", "randomness", "optimal_trees"},
    {"fused_verification"},
    {"verification", "requests", "grammars"},
    {"tree_verification"},
    {"models", "synthetic", "device_rows"},
    {"cache", "models.markov", "models.elsewhere"},
    {"models.fusion", "models.length_factors"},
    {"models.early_exit"},
    {"models.causal"},
    {"models.eagle", "models.seq2seq"},
    {"models.derived"},
    {"models.loading"},
    {"proposers", "adaptive", "proposers.suffix_tree"},
    {"proposers.ngram", "proposers.chain", "proposers.tree"},
    {"proposers.draft_model", "proposers.eagle", "proposers.early_exit", "proposers.suffix", "proposers.table"},
    {"proposers.hybrid"},
    {"drafts", "decoding"},
    {"engine"},
    {"__init__"},
    {"screen"},
    {"__main__"},
    {"conformance", "conformance.enumeration", "conformance.mutants", "conformance.sizes"},
    {"conformance.betting", "conformance.facts", "conformance.reference"},
    {"conformance.instruments", "conformance.certificate", "conformance.divergence"},
    {"conformance.verdicts"},
    {"conformance.arms"},
    {"conformance.audit"},
    {"distill", "distill.prompts", "distill.loss", "distill.cost"},
    {"distill.corpus", "distill.tree"},
    {"distill.dataset"},
    {"distill.students"},
    {"distill.training"},
    {"distill.comparison"},
    {"distill.commands"},
    {"distill.__main__"},
]
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    """Modules of specdec that a file imports, at its top or inside a function."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.removeprefix("specdec.") for name in found if name.startswith("specdec.")}


def test_imports_go_strictly_downwards() -> None:
    for path in ROOT.rglob("*.py"):
        name = module_name(path)
        assert name in HEIGHT, f"{name} has no place in LAYERS; decide where it lives"
        back_edges = {other for other in imports(path) if HEIGHT[other] >= HEIGHT[name]}
        assert not back_edges, f"{name} imports {back_edges}, which are not below it"


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
