"""The default pair with its real weights, if available: the speedup of each method, and whether its output is right.

SPECDEC_FIRST_LIGHT_WEIGHTS names a folder with the pieces that `python -m bench.first_light --pack FOLDER` wrote on a
machine with network access; without it, the model must be in the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from bench.catalogue.pairs import catalogue
from bench.first_light.pieces import why_unavailable
from bench.first_light.report import Report
from bench.first_light.shapes import Loaded, Work, load
from specdec import Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.prompts import encode
from specdec.runtime.artifacts import LoadError

_METHODS = ("eagle", "draft_model", "hybrid", "tree", "ngram", "suffix")
_QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, with a test for it.",
    "Repeat after me, word for word: the cat sat on the mat, and the dog barked at the cat until the cat left the mat.",
    "If a train travels 60 miles in 1.5 hours, what is its average speed? Think step by step.",
    "Explain to a child why the sky is blue.",
)


def run(report: Report, device: torch.device) -> None:
    """Load the pair, compare its tokens with those of the CPU, and time its methods."""
    try:
        if reason := why_unavailable():
            report.skip("the default pair", reason)
            return
    except LoadError as error:
        report.check("the default pair is unpacked", False, str(error))
        return
    models = None
    with report.attempt("the default pair is loaded"):
        start_s = time.perf_counter()
        models = load(catalogue()["smollm2-135m"], device)
        report.fact("loaded", text=f"the default pair loaded in {time.perf_counter() - start_s:.1f} s")
    if models is None:
        return
    prompts = [encode(question, models.target.tokenizer) for question in _QUESTIONS]
    if device.type != "cuda":
        Work(report, models, prompts=prompts[:1], rates=None).methods((0.0,), ("eagle",), num_tokens=6)
        _tokens(report, models, prompts[:2], ("eagle",), 6)
        return
    Work(report, models, prompts=prompts, rates=None).methods((0.0, 1.0), _METHODS, num_tokens=128)
    _tokens(report, models, prompts[:2], _METHODS, 64)
    with report.attempt("tokens of the CPU"):
        _against_cpu(report, models, prompts[:2])


def _tokens(
    report: Report, models: Loaded, prompts: Sequence[Sequence[int]], methods: Sequence[str], num_tokens: int
) -> None:
    """Check that the greedy output of every method equals plain decoding, two prompts at a time."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    plain: list[Any] = []
    for method in ("autoregressive", *methods):
        with report.attempt(f"tokens of {method}"):
            engine = Engine(models.target, method=method, draft=models.drafts.get(method), max_batch_size=2)
            tokens = [completion.token_ids for completion in engine.generate(prompts, sampling)]
            plain = plain or tokens
            difference = "" if tokens == plain else _first_difference(tokens, plain)
            report.check(f"the default pair's {method} = plain", tokens == plain, difference)


def _against_cpu(report: Report, models: Loaded, prompts: Sequence[Sequence[int]]) -> None:
    """Compare with the CPU. In bfloat16 near ties may resolve differently, so this is a fact and not a check."""
    sampling = SamplingParams(temperature=0, max_tokens=32)
    options: dict[str, Any] = {"dtype": models.target.dtype, "attention": "sdpa", "load_format": "auto"}
    cpu, _ = load_with_drafts(catalogue()["smollm2-135m"].target, (), device="cpu", **options)
    tokens, cpu_tokens = ([c.token_ids for c in Engine(m).generate(prompts, sampling)] for m in (models.target, cpu))
    result = "the same tokens" if tokens == cpu_tokens else _first_difference(tokens, cpu_tokens)
    report.fact(
        "tokens of the CPU",
        text=f"the default pair in {models.target.dtype}, compared with the CPU: {result}",
        tokens=tokens,
        cpu_tokens=cpu_tokens,
    )


def _first_difference(rows: list[Any], other_rows: list[Any]) -> str:
    """Describe the first difference between two lists of token ids that are not equal."""
    row, (one, other) = next(
        (row, pair) for row, pair in enumerate(zip(rows, other_rows, strict=True)) if pair[0] != pair[1]
    )
    shared = [a == b for a, b in zip(one, other, strict=False)]
    return f"first difference in row {row} at token {[*shared, False].index(False)}"
