"""A worker that runs OpenVINO GenAI: a script for the interpreter that has it, without other dependencies.

The first request names the model, a GGUF file, and the options of the pipeline; each later one is a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from protocol import main  # beside this file

ENDS = {"STOP": "stop", "LENGTH": "length"}


def serve(requests: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Answer each request; the first one loads the model."""
    pipeline = load(**next(requests))
    yield {"version": genai.__version__.partition("-")[0]}
    for request in requests:
        yield generate(pipeline, **request)


def load(model: str, properties: dict[str, Any], prompt_lookup: bool) -> Any:
    """The pipeline. properties: of OpenVINO's CPU plugin. Prompts are not cached from call to call."""
    options: dict[str, Any] = dict(properties)
    if prompt_lookup:  # this pipeline batches requests, and would cache prompts
        options["prompt_lookup"] = True
        options["scheduler_config"] = genai.SchedulerConfig()
        options["scheduler_config"].enable_prefix_caching = False
    return genai.LLMPipeline(model, "CPU", **options)


class Steps(genai.StreamerBase):  # type: ignore[misc]  # openvino-genai has no types
    """Records the tokens of each step and their time since `start_s`."""

    def __init__(self, start_s: float) -> None:
        super().__init__()
        self.start_s = start_s
        self.emitted: list[int] = []
        self.times_s: list[float] = []

    def write(self, token: int | list[int]) -> Any:
        self.emitted.append(len(token) if isinstance(token, list) else 1)
        self.times_s.append(time.perf_counter() - self.start_s)
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing to flush."""


def generate(pipeline: Any, prompt: list[int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Continue a prompt, given as token ids. config: attributes of GenerationConfig. Times are in seconds."""
    ids = np.array([prompt], np.int64)
    inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
    steps = Steps(time.perf_counter())
    result = pipeline.generate(inputs, generation_config(config), steps)
    last_s = time.perf_counter() - steps.start_s
    return {
        "token_ids": [int(token) for token in result.tokens[0]],
        "emitted": steps.emitted,
        "first_s": steps.times_s[0],
        "last_s": last_s,
        "finish_reason": ENDS.get(result.finish_reasons[0].name),
    }


def generation_config(config: Mapping[str, Any]) -> Any:
    made = genai.GenerationConfig()
    for name, value in config.items():
        setattr(made, name, set(value) if name == "stop_token_ids" else value)
    return made


if __name__ == "__main__":
    main(serve)
