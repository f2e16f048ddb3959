"""vLLM as a plain script has it, `LLM.generate`, to measure what the harness's worker adds; see `tools/vllm_overhead`.

It speaks as the worker does, and is given the same arguments of the engine; what those leave out, it leaves out too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import vllm_worker  # beside this file


def serve(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """An answer to each request, the first of which starts the engine."""
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
