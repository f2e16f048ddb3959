"""What the harness adds to vLLM: `python -m bench.vllm_overhead --vllm-python PATH`.

The same prompts go, in turn, to an engine as the benchmarks have it and to `LLM.generate` in a plain script of the same
interpreter, environment and arguments, but with its tokenizer, and without statistics.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import workloads
from bench.engines import LoadOptions, Setup, VllmOptions
from bench.engines.process import Worker
from bench.engines.vllm import (
    CALL_TIMEOUT_S,
    SCRIPT,
    START_TIMEOUT_S,
    configuration,
    load,
    sampling_arguments,
    worker_environment,
)
from bench.intervals import geometric_mean_interval
from bench.pairs import catalogue
from specdec import SamplingParams
from specdec.prompts import encode

PAIR = catalogue()["smollm2-135m"]
NOT_PLAIN = ("skip_tokenizer_init", "disable_log_stats", "generation_config")  # what a plain script does not say


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm_overhead", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument("--gamma", type=int, default=0, help="tokens that prompt lookup proposes; 0 is plain decoding")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    options = LoadOptions(PAIR.dtype, "cpu", vllm=VllmOptions(given.vllm_python))
    setup = Setup("ngram" if given.gamma else "autoregressive", given.gamma, 1)
    with closing(load(PAIR, options)) as engine, closing(_plain(options, setup)) as plain:
        engine.prepare({setup})
        texts = workloads.sample(workloads.read("humaneval", None), given.num_prompts, 0)
        prompts = [encode(prompt.text, engine.tokenizer) for prompt in texts]
        params = SamplingParams(temperature=0, max_tokens=given.max_tokens)
        for prompt in prompts[:2]:  # warm up
            _round(engine, plain, setup, prompt, params, turned=False)
        rounds = [
            _round(engine, plain, setup, prompt, params, turned=bool(index % 2)) for index, prompt in enumerate(prompts)
        ]
    for name, column in (("latency", 0), ("wall time of the call", 1)):
        interval = geometric_mean_interval([times[column] / times[2] for times in rounds])
        print(
            f"{setup}, {len(rounds)} prompts: {name} in the harness over wall time in a plain script "
            f"{interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
        )


def _plain(options: LoadOptions, setup: Setup) -> Worker:
    python = str(options.vllm.python)
    command = [python, str(SCRIPT.with_name("vllm_plain.py"))]
    worker = Worker("plain script", command, worker_environment(python, options.device))
    config = configuration(PAIR, options, setup)
    for key in NOT_PLAIN:
        del config["engine"][key]
    worker.ask(config, START_TIMEOUT_S)
    return worker


def _round(
    engine: Any, plain: Worker, setup: Setup, prompt: Sequence[int], params: SamplingParams, *, turned: bool
) -> tuple[float, float, float]:
    """Seconds: latency in the harness, the whole call there, and the call in the plain script; one after the other."""
    request = {"prompts": [list(prompt)], "sampling": [sampling_arguments(params, engine.stop_token_ids)]}
    answer = plain.ask(request, CALL_TIMEOUT_S) if turned else {}
    start_s = time.perf_counter()
    (result,) = engine.generate([prompt], setup.method, setup.gamma, [params]).results
    call_s = time.perf_counter() - start_s
    answer = answer or plain.ask(request, CALL_TIMEOUT_S)
    assert [list(result.token_ids)] == answer["token_ids"], "both must do the same work"
    return result.latency_s, call_s, answer["wall_s"]


if __name__ == "__main__":
    main()
