"""Alternating measurements of transformers' `generate` and this library's plain decoding, on models of one shape."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig

from bench.catalogue.pairs import Pair, catalogue, folder
from bench.first_light.report import Report
from bench.first_light.shapes import load
from specdec import Engine, SamplingParams
from specdec.models.loading import load_pretrained
from specdec.runtime.timing import now_s

NUM_TOKENS, ROUNDS = 32, 2


def run(report: Report, device: torch.device) -> None:
    """The 135M shape, then the 8B shape; without a GPU a tiny one."""
    names = ("smollm2-135m-shape", "llama-8b-1b-shape") if device.type == "cuda" else ("tiny-random",)
    for name in names:
        with report.attempt(f"{name} beside transformers"):
            _compare(report, catalogue()[name], device)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _compare(report: Report, pair: Pair, device: torch.device) -> None:
    target_alone = Pair(pair.name, pair.target, load_format=pair.load_format, context=pair.context)
    engine = Engine(load(target_alone, device).target)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device, "load_format": pair.load_format}
    model, _ = load_pretrained(folder(pair.target), **options)
    model.generation_config = GenerationConfig()  # the model's own may stop early or use beam search
    prompts = [[token * 7919 % model.config.vocab_size for token in range(n, 2 * n)] for n in (64, 90)]
    arms: dict[str, Callable[[list[int]], float]] = {
        "specdec": lambda prompt: _specdec_s(engine, prompt),
        "transformers": lambda prompt: _transformers_s(model, prompt),
        "transformers, static cache": lambda prompt: _transformers_s(model, prompt, cache_implementation="static"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():  # warms up
        for prompt in [*prompts, *prompts]:
            arm(prompt)
    for number in range(ROUNDS):
        for prompt in prompts:
            for name, arm in list(arms.items())[:: -1 if number % 2 else 1]:
                seconds[name].append(arm(prompt))
    token_s = {name: statistics.median(times) / NUM_TOKENS for name, times in seconds.items()}
    report.fact("latency", pair=pair.name, num_tokens=NUM_TOKENS, seconds=seconds, token_s=token_s)
    times = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in token_s.items())
    ratio = token_s["transformers"] / token_s["specdec"]
    report.fact("latencies", text=f"{pair.name}: ms per token of a call: {times}; {ratio:.2f} times as fast")


def _specdec_s(engine: Engine, prompt: list[int]) -> float:
    start_s = time.perf_counter()
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True))
    return now_s(engine.target.device) - start_s


def _transformers_s(model: Any, prompt: list[int], **options: Any) -> float:
    """Seconds per call. A static cache is used without compilation, which would exceed the time limit."""
    tokens = torch.tensor([prompt], device=model.device)
    config = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0, disable_compile=True, **options
    )
    start_s = now_s(model.device)
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    duration_s = now_s(model.device) - start_s
    assert output.shape[1] == len(prompt) + NUM_TOKENS, "every call must emit NUM_TOKENS tokens"
    return duration_s
