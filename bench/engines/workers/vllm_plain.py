"""A plain script with `LLM.generate`, to measure the overhead of the harness's worker; see `tools/vllm_overhead`.

It has the worker's protocol, and passes the same arguments to the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import vllm_worker  # beside this file


def serve(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answer each request; the first one starts the engine."""
    from vllm import LLM, SamplingParams

    first = next(requests)
    llm = LLM(**first["engine"], speculative_config=first["speculative"])
    yield {}
    for request in requests:
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
        params = [SamplingParams(**arguments) for arguments in request["sampling"]]
        start_s = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        wall_s = time.perf_counter() - start_s
        yield {"wall_s": wall_s, "token_ids": [list(output.outputs[0].token_ids) for output in outputs]}


if __name__ == "__main__":
    vllm_worker.main(serve)
