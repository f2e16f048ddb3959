"""The overhead of the harness over vLLM: `python -m bench.tools.vllm_overhead --vllm-python PATH`.

The same prompts go, in turn, to an engine as the benchmarks have it and to `LLM.generate` in plain scripts of the same
interpreter and arguments, but with its tokenizer, and without statistics: one in the environment that the harness gives
to vLLM, and one in none but the caller's own, so that neither the harness nor its choice of variables can slow vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from bench.catalogue.pairs import catalogue
from bench.engines.base import LoadOptions, Peers, Setup, VllmOptions
from bench.engines.process import Worker, foreign_environment
from bench.engines.vllm import (
    CALL_TIMEOUT_S,
    SCRIPT,
    START_TIMEOUT_S,
    configuration,
    load,
    sampling_arguments,
    worker_environment,
)
from bench.records.intervals import geometric_mean_interval
from bench.workloads import registry
from specdec import SamplingParams
from specdec.prompts import encode
from specdec.runtime.command_line import Parser

PAIR = catalogue()["smollm2-135m"]
HARNESS = "the harness's environment"
ENVIRONMENTS = (HARNESS, "the caller's environment")
SETTLE_S = 0.5  # an idle thread of OpenMP keeps its CPU busy for 0.2 s
NOT_PLAIN = ("skip_tokenizer_init", "disable_log_stats", "generation_config")  # what a plain script does not say


def main() -> None:
    parser = Parser(prog="python -m bench.tools.vllm_overhead", description=__doc__)
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter that has vLLM")
    parser.add_argument("--gamma", type=int, default=0, help="tokens that prompt lookup proposes; 0 is plain decoding")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args()
    options = LoadOptions(PAIR.dtype, "cpu", peers=Peers(vllm=VllmOptions(given.vllm_python)))
    setup = Setup("ngram" if given.gamma else "autoregressive", given.gamma, 1)
    with closing(load(PAIR, options)) as engine, ExitStack() as stack:
        plain = {name: stack.enter_context(closing(_plain(options, setup, name))) for name in ENVIRONMENTS}
        engine.prepare({setup})
        texts = registry.sample(registry.read("humaneval", None), given.num_prompts, 0)
        prompts = [encode(prompt.text, engine.tokenizer) for prompt in texts]
        params = SamplingParams(temperature=0, max_tokens=given.max_tokens)
        for prompt in prompts[:2]:  # warm up
            _round(engine, plain, setup, prompt, params, turned=False)
        rounds = [
            _round(engine, plain, setup, prompt, params, turned=bool(index % 2)) for index, prompt in enumerate(prompts)
        ]
    for environment in plain:
        for name in ("latency", "call"):
            interval = geometric_mean_interval([times[name] / times[environment] for times in rounds])
            print(
                f"{setup}, {len(rounds)} prompts: {name} per token in the harness over a plain script's in "
                f"{environment} {interval.estimate:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
            )


def _plain(options: LoadOptions, setup: Setup, environment: str) -> Worker:
    python = str(options.peers.vllm.python)
    command = [python, str(SCRIPT.with_name("vllm_plain.py"))]
    variables = worker_environment(python, options.device) if environment == HARNESS else _own_environment()
    worker = Worker(f"plain script in {environment}", command, variables)
    config = configuration(PAIR, options, setup)
    for key in NOT_PLAIN:
        del config["engine"][key]
    worker.ask(config, START_TIMEOUT_S)
    return worker


def _own_environment() -> dict[str, str]:
    """The caller's, without what points its Python to this project; three engines must fit into the memory."""
    own = foreign_environment()
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **own}


def _round(
    engine: Any,
    plain: Mapping[str, Worker],
    setup: Setup,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    turned: bool,
) -> dict[str, float]:
    """Seconds per emitted token, one after the other: latency and whole call in the harness, call in each plain script.

    Another environment may compute in another order, and near ties in 16 bits then fall the other way.
    """
    request = {"prompts": [list(prompt)], "sampling": [sampling_arguments(params, engine.stop_token_ids)]}
    times: dict[str, float] = {}

    def harness() -> None:
        start_s = time.perf_counter()
        (result,) = engine.generate([prompt], setup.method, setup.gamma, [params]).results
        call_s, num_tokens = time.perf_counter() - start_s, len(result.token_ids)
        times.update(latency=result.latency_s / num_tokens, call=call_s / num_tokens)

    def script(name: str) -> None:
        answer = plain[name].ask(request, CALL_TIMEOUT_S)
        times[name] = answer["wall_s"] / len(answer["token_ids"][0])

    calls: list[Callable[[], None]] = [harness, *(partial(script, name) for name in plain)]
    for call in reversed(calls) if turned else calls:
        call()
        time.sleep(SETTLE_S)
    return times


if __name__ == "__main__":
    main()
