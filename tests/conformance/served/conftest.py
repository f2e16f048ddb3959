"""A tiny target with a tokenizer, and engines of it with and without speculation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny
from helpers.tokens import letters

from specdec import Engine
from specdec.conformance.__main__ import main

PROMPTS = ["the cat the cat the", "one two one two", "an inn, an inn,", "no. no. no."]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    model = tiny.make("llama", tiny.GQA | {"max_position_embeddings": 256})
    model.save_pretrained(folder)
    letters(tiny.GQA["vocab_size"]).save_pretrained(folder)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    return folder


@pytest.fixture(scope="session")
def engines(target: Path) -> dict[str, Engine]:
    loaded = {"dtype": "float32", "device": "cpu"}
    return {
        "speculative": Engine.load(str(target), method="draft_model", draft=str(target), **loaded),
        "plain": Engine.load(str(target), method="autoregressive", **loaded),
    }


@pytest.fixture
def audit(target: Path, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command; the exit status and the certificate."""

    def run(url: str, *options: str) -> tuple[int, dict[str, Any]]:
        given = ["--url", url, "--target", str(target), "--prompts", str(target / "prompts.jsonl")]
        status = main(["audit", *given, "--out", str(tmp_path), "--device", "cpu", *options])
        path = tmp_path / "audit.json"
        return status, json.loads(path.read_text()) if path.exists() else {}

    return run
