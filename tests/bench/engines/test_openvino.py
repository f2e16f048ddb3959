"""OpenVINO GenAI without OpenVINO: what its worker is asked, and what becomes of an answer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.catalogue.pairs import catalogue
from bench.engines import openvino
from bench.engines.base import LoadOptions, Peers, Setup
from bench.engines.openvino import OpenvinoEngine, drafting, generation_config, properties, result
from bench.engines.registry import why_not
from specdec import SamplingParams
from specdec.servers.errors import EngineError

ANSWER = {"token_ids": [5, 6, 7, 8], "emitted": [1, 2, 1], "first_s": 0.5, "last_s": 1.0, "finish_reason": "length"}
WORKER = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
first = json.loads(sys.stdin.readline())
for line in sys.stdin:
    request = json.loads(line)
    tokens = request["prompt"] + [request["config"]["max_new_tokens"], int(first["prompt_lookup"])]
    answer = {"token_ids": tokens, "emitted": [1] * len(tokens), "first_s": 1.0, "last_s": 2.0, "finish_reason": "stop"}
    print(json.dumps(answer), flush=True)
"""


def test_sampling_parameters_are_those_of_openvino() -> None:
    greedy = generation_config(SamplingParams(temperature=0, max_tokens=9), {2})
    assert greedy == {"max_new_tokens": 9, "do_sample": False, "ignore_eos": False, "stop_token_ids": [2]}
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, seed=3, max_tokens=9, ignore_eos=True)
    sampled = generation_config(params, {2})
    expected = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "rng_seed": 3, "stop_token_ids": []}
    assert expected.items() <= sampled.items()
    assert "top_k" not in generation_config(SamplingParams(temperature=0.5), {2})  # all tokens


def test_nothing_is_quantized_that_other_engines_do_not_quantize() -> None:
    wanted = {"KV_CACHE_PRECISION": "bf16", "INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    assert wanted.items() <= properties("bfloat16").items()


def test_only_prompt_lookup_drafts() -> None:
    assert drafting(Setup("autoregressive", 0, 1)) == {}
    assert drafting(Setup("ngram", 4, 1)) == {"num_assistant_tokens": 4, "max_ngram_size": 3}


def test_plain_decoding_has_counters_and_prompt_lookup_has_none() -> None:
    plain = result(ANSWER, is_drafting=False)
    assert plain.counts is not None
    assert (plain.counts.num_steps, plain.counts.num_drafted) == (3, 0)
    assert (plain.token_ids, plain.ttft_s, plain.latency_s) == ((5, 6, 7, 8), 0.5, 1.0)
    assert result(ANSWER, is_drafting=True).counts is None


def test_a_stream_without_all_tokens_is_an_error() -> None:
    with pytest.raises(EngineError, match="must stream all of its 4 tokens, but streamed 1"):
        result(ANSWER | {"emitted": [1]}, is_drafting=True)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenvinoEngine:
    """The engine with a worker that answers with its request."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(openvino, "SCRIPT", script)
    monkeypatch.setattr(openvino, "gguf_file", lambda source, kind, converter: Path(f"{source}.{kind}.gguf"))
    options = LoadOptions("bfloat16", "cpu", peers=Peers(openvino_python=Path(sys.executable)))
    return OpenvinoEngine(catalogue()["smollm2-135m"], options, {2})


@pytest.mark.parametrize(("setup", "is_lookup"), [(Setup("ngram", 4, 1), 1), (Setup("autoregressive", 0, 1), 0)])
def test_a_prompt_goes_to_the_worker_of_its_setup(engine: OpenvinoEngine, setup: Setup, is_lookup: int) -> None:
    engine.prepare({setup})
    run = engine.generate([[5, 6]], setup.method, setup.gamma, [SamplingParams(max_tokens=9)])
    assert [each.token_ids for each in run.results] == [(5, 6, 9, is_lookup)]
    assert engine.version == "1"
    engine.close()


def test_other_devices_are_refused() -> None:
    engine = OpenvinoEngine(catalogue()["smollm2-135m"], LoadOptions("bfloat16", "cuda"), {2})
    with pytest.raises(EngineError, match="runs on the CPU, not on device=cuda"):
        engine.prepare({Setup("ngram", 4, 1)})


def test_a_missing_interpreter_is_reported_with_the_remedy(tmp_path: Path) -> None:
    without, having = tmp_path / "without", tmp_path / "having"
    for python, body in ((without, "exit 1"), (having, "echo 2026.4.1.0")):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(0o755)
    reason = why_not("openvino", "ngram", 1, peers=Peers(openvino_python=without))
    assert reason is not None
    assert f"{without} has none" in reason
    assert "openvino/bin/pip install openvino-genai" in reason
    assert why_not("openvino", "ngram", 1, peers=Peers(openvino_python=having)) is None
