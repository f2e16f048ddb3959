"""Audits as cells of the benchmarks: requests to the engine, refusals, and a run from end to end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from helpers.audited import PROMPTS, ToyEngine
from helpers.warm import run_python

from bench.campaign.config import BenchConfig
from bench.campaign.golden import AcceptanceLength
from bench.catalogue.pairs import catalogue
from bench.engines.base import PromptResult, Run
from bench.measure.cells import audit
from bench.records import fields
from bench.records.schema import Cell
from specdec import SamplingParams
from specdec.conformance.audit import audit as audit_engine
from specdec.conformance.certificate import Certificate
from specdec.conformance.reference import Reference

ROOT = Path(__file__).parents[3]
CELL = Cell("specdec", "tiny-random", "ngram", 2, "same", "smoke", 2)


class Recorded:
    """An engine that records its requests and emits one token."""

    version = "1"

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, list[SamplingParams]]] = []

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Any, sampling: Sequence[SamplingParams]
    ) -> Run:
        self.calls.append((method, gamma, list(sampling)))
        return Run(tuple(PromptResult((prompt[0],), 0.1, 0.1, None, "length") for prompt in prompts))


def test_both_arms_are_the_cell_s_engine_with_its_sampling_and_seeds_of_their_own() -> None:
    engine, params = Recorded(), SamplingParams(temperature=0.7, top_k=5)
    audited = audit.Audited(engine, CELL, params)  # type: ignore[arg-type]
    assert audited.speculative([[3], [4]], [8, 9], 12) == [[3], [4]]
    assert audited.plain([[5]], [1], 6) == [[5]]
    assert engine.calls == [
        ("ngram", 2, [replace(params, seed=seed, max_tokens=12) for seed in (8, 9)]),
        ("autoregressive", 0, [replace(params, seed=1, max_tokens=6)]),
    ]


def test_plain_decoding_runs_once_for_all_methods_of_a_run() -> None:
    engine, outputs, params = Recorded(), {}, SamplingParams()
    for method in ("ngram", "draft_model"):
        audited = audit.Audited(engine, replace(CELL, method=method), params, plain_outputs=outputs)  # type: ignore[arg-type]
        assert audited.plain([[5]], [1], 6) == [[5]]
    assert len(engine.calls) == 1
    other = audit.Audited(engine, CELL, replace(params, top_k=2), plain_outputs=outputs)  # type: ignore[arg-type]
    for each, seed in ((audited, 2), (other, 1)):
        assert each.plain([[5]], [seed], 6) == [[5]]
    assert len(engine.calls) == 3


@pytest.mark.parametrize(
    ("sampling", "options", "name"),
    [
        ({}, "{}", "vllm-tiny-random-ngram-2-block"),
        ({"temperature": 0.0, "top_k": 20}, "{}", "vllm-tiny-random-ngram-2-block-temperature=0-top_k=20"),
        (
            {},
            '{"speculative_config": {"draft_sample_method": "probabilistic"}}',
            "vllm-tiny-random-ngram-2-block-probabilistic",
        ),
    ],
)
def test_certificates_that_differ_have_names_that_differ(
    sampling: dict, options: str, name: str, make_config: Callable[..., BenchConfig]
) -> None:
    engine = ToyEngine(SamplingParams(max_tokens=4))
    found = audit_engine(
        engine, Reference(engine.target, SamplingParams(max_tokens=4, **sampling)), PROMPTS, num_draws=8
    )
    config, cell = make_config(vllm_options=options, verification="block"), replace(CELL, engine="vllm")
    certificate = Certificate.of(audit.subject(cell, "1", config), found)
    assert audit.file_name(certificate) == name
    assert Certificate.from_record(certificate.record()).record() == certificate.record()
    assert ("Engine options: " in certificate.markdown()) == (options != "{}")


def test_the_reference_has_the_values_of_the_weights_that_this_engine_quantizes(
    make_config: Callable[..., BenchConfig],
) -> None:
    """Its dtype is the one that they are quantized from; other engines read files of their own."""
    pair, plain, quantized = catalogue()["tiny-random"], make_config(), make_config(quantization="int8")
    exact = {"dtype": torch.float32}
    assert audit._exact(pair, CELL, plain) == exact
    assert audit._exact(pair, replace(CELL, engine="llama-server"), quantized) == exact
    dtype = getattr(torch, quantized.dtype_of(pair))
    assert audit._exact(pair, CELL, quantized) == {"dtype": dtype, "quantization": "int8", "dequantize": True}
    assert audit.subject(CELL, "1", quantized).options == '{"quantization": "int8"}'
    assert audit.subject(CELL, "1", plain).options is None


@pytest.mark.parametrize(
    "changes", [{"synthetic_acceptance_rates": (0.5,)}, {"synthetic_acceptance_length": AcceptanceLength(2.5)}]
)
def test_prescribed_acceptance_is_refused(changes: dict[str, Any], make_config: Callable[..., BenchConfig]) -> None:
    config = make_config(**changes)
    with pytest.raises(ValueError, match="synthetic acceptance must be left out: with prescribed acceptance"):
        audit.certify(Recorded(), CELL, catalogue()["tiny-random"], [[1]], config, "cpu")  # type: ignore[arg-type]


def run(tmp_path: Path, *arguments: str) -> CompletedProcess[str]:
    command = ["-m", "pytest", "bench/", "--smoke", "-p", "no:cacheprovider", "--engines", "specdec"]
    command += ["--methods", "autoregressive,ngram", "--journal", str(tmp_path / "journal.jsonl"), *arguments]
    return run_python(*command, cwd=ROOT, env=os.environ)


def test_a_run_leaves_certificates(tmp_path: Path) -> None:
    """300 tokens are too few for a verdict, and the certificate states how many are needed."""
    output = tmp_path / "out.json"
    arguments = ["-m", "equivalence", "--temperature", "1", "--certificates", str(tmp_path / "certificates")]
    done = run(tmp_path, *arguments, "--benchmark-json", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    (cell,) = json.loads(output.read_text())["benchmarks"]
    record = cell["extra_info"]
    assert set(record) == fields.names("certificates")
    assert (record["verdict"], record["num_draws"]) == ("inconclusive", 300)
    assert record["num_draws_needed"] > 10_000
    assert "speculation not confirmed" in record["reasons"][0]  # two tokens drafted, none accepted
    assert any("num_draws=300 must be at least" in reason for reason in record["reasons"])
    assert "-m equivalence --temperature 1" in record["command"]
    (path,) = (tmp_path / "certificates").glob("*.json")
    assert Certificate.load(path).record() == record
    assert "inconclusive" in path.with_suffix(".md").read_text()


def test_other_runs_have_no_audits(tmp_path: Path) -> None:
    done = run(tmp_path, "--collect-only", "-q")
    assert "test_speedup" in done.stdout
    assert "test_equivalence[" not in done.stdout
