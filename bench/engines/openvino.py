"""OpenVINO GenAI on a CPU, in worker processes: one pipeline, and so one worker, per method and gamma.

It reads GGUF files, though not those in bfloat16 or float32: without quantization the weights are read in float16 and
computed with in the dtype asked for. By default it stores keys and values in 8 bits and quantizes activations; here it
does neither, as no other engine does. Its prompt lookup does not report how many tokens it drafted, so these cells have
no counters.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import Pair, folder
from bench.engines import counters
from bench.engines.base import LoadOptions, Peers, PromptResult, Run, Setup
from bench.engines.llama_files import CONVERTER, gguf_file
from bench.engines.pool import PooledEngine
from bench.engines.process import Worker, foreign_environment
from bench.engines.vllm import CALL_TIMEOUT_S, START_TIMEOUT_S, stop_tokens
from bench.records.schema import Gamma
from specdec import SamplingParams
from specdec.models.loading import resolve
from specdec.servers.errors import EngineError

SCRIPT = Path(__file__).parent / "workers" / "openvino_worker.py"
PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}  # torch's name -> OpenVINO's
LOOKUP_SIZE = 3  # most tokens that prompt lookup compares


class OpenvinoEngine(PooledEngine[Worker]):
    """OpenVINO GenAI with a pair's target, in at most two workers."""

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, worker = self._pool.find(method, gamma, len(prompts))
        (prompt,), (params,) = prompts, sampling
        config = generation_config(params, self.stop_token_ids) | drafting(setup)
        try:
            answer = worker.ask({"prompt": list(prompt), "config": config}, CALL_TIMEOUT_S)
            return Run((result(answer, is_drafting=method != "autoregressive"),))
        except EngineError:
            self._pool.drop(setup)
            raise

    def _started(self, setup: Setup) -> Worker:
        if self._options.device != "cpu":
            raise EngineError(
                f"engine=openvino runs on the CPU, not on device={self._options.device}; use --device cpu"
            )
        llama = self._options.peers.llama.program
        converter = llama.with_name(CONVERTER) if llama else None
        request = {
            "model": str(gguf_file(self._pair.target, self._options.quantization or "float16", converter)),
            "properties": properties(self._options.dtype),
            "prompt_lookup": setup.method == "ngram",
        }
        python = str(self._options.peers.openvino_python or sys.executable)
        worker = Worker(f"engine=openvino, {setup}", [python, str(SCRIPT)], foreign_environment())
        self.version = worker.ask(request, START_TIMEOUT_S)["version"]
        return worker


def load(pair: Pair, options: LoadOptions) -> OpenvinoEngine:
    """The engine; its workers load the model on first use."""
    return OpenvinoEngine(pair, options, stop_tokens(resolve(folder(pair.target))))


def properties(dtype: str) -> dict[str, Any]:
    """Properties of OpenVINO's CPU plugin: computes and stores keys and values in `dtype`, quantizes no activations."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "KV_CACHE_PRECISION": PRECISIONS[dtype],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }


def generation_config(params: SamplingParams, stop_token_ids: Collection[int]) -> dict[str, Any]:
    """The same distribution and stop rules as specdec's, as attributes of OpenVINO's GenerationConfig."""
    config: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "do_sample": params.temperature > 0,
        "ignore_eos": params.ignore_eos,
        "stop_token_ids": [*params.stop_token_ids, *([] if params.ignore_eos else sorted(stop_token_ids))],
    }
    if params.temperature > 0:
        config |= {"temperature": params.temperature, "top_p": params.top_p, "rng_seed": params.seed}
        config |= {"top_k": params.top_k} if params.top_k else {}
    return config


def drafting(setup: Setup) -> dict[str, Any]:
    """Attributes of GenerationConfig for a setup."""
    if setup.method == "autoregressive":
        return {}
    return {"num_assistant_tokens": setup.gamma, "max_ngram_size": LOOKUP_SIZE}


def result(answer: Mapping[str, Any], *, is_drafting: bool) -> PromptResult:
    """The result of a prompt, from a worker's answer."""
    tokens, emitted = tuple(answer["token_ids"]), answer["emitted"]
    if sum(emitted) != len(tokens):
        raise EngineError(f"engine=openvino must stream all of its {len(tokens)} tokens, but streamed {sum(emitted)}")
    return PromptResult(
        tokens,
        answer["first_s"],
        answer["last_s"],
        None if is_drafting else counters.plain(len(tokens)),
        answer["finish_reason"],
        why_no_counts="OpenVINO's prompt lookup does not report how many tokens it drafted" if is_drafting else None,
    )


@cache
def installed_version(python: Path | None) -> str | None:
    """The version of openvino-genai that an interpreter has, found without importing it; None if it has none."""
    code = "from importlib.metadata import version; print(version('openvino-genai'))"
    command = [str(python or sys.executable), "-c", code]
    done = subprocess.run(
        command, env=foreign_environment(), capture_output=True, text=True, check=False, cwd=SCRIPT.parent
    )
    return done.stdout.strip() if done.returncode == 0 else None


def why_missing(engine: str, peers: Peers) -> str | None:
    """Why an interpreter cannot run the engine, with the remedy; None if it can."""
    python = peers.openvino_python
    if installed_version(python):
        return None
    return (
        f"engine={engine} needs an interpreter with openvino-genai, and {python or sys.executable} has none; create "
        "one and name it with --openvino-python: python3 -m venv openvino, then "
        "openvino/bin/pip install openvino-genai==2026.4.1.0"
    )
