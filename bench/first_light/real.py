"""The real default pair, where its weights are there: what each method gains, and whether it says the same.

SPECDEC_FIRST_LIGHT_WEIGHTS names a folder with the pieces that `python -m bench.first_light --pack FOLDER` wrote on a
machine that can fetch the model; without it the model must be in the cache.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import catalogue
from bench.first_light.pieces import unpack
from bench.first_light.report import Report
from bench.first_light.shapes import Loaded, Work, load
from specdec import Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.models.loading import SMOLLM2_135M
from specdec.prompts import encode
from specdec.runtime.artifacts import LoadError, folder_of, is_complete

WEIGHTS = "SPECDEC_FIRST_LIGHT_WEIGHTS"
_METHODS = ("eagle", "draft_model", "hybrid", "tree", "ngram", "suffix")
_QUESTIONS = (
    "Write a Python function that returns the n-th Fibonacci number, with a test for it.",
    "Repeat after me, word for word: the cat sat on the mat, and the dog barked at the cat until the cat left the mat.",
    "If a train travels 60 miles in 1.5 hours, what is its average speed? Think step by step.",
    "Explain to a child why the sky is blue.",
)


def run(report: Report, device: torch.device) -> None:
    """Loads the pair, compares its tokens with those of the CPU, and times its methods."""
    try:
        if reason := why_not_there():
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


def why_not_there() -> str | None:
    """Why the default model is not in the cache, where its pieces are put together if need be; None if it is.

    Raises LoadError for pieces that are not whole.
    """
    if is_complete(folder_of(SMOLLM2_135M)):
        return None
    if not (pieces := os.environ.get(WEIGHTS)):
        return f"its weights are not in the cache, and {WEIGHTS} names no folder with pieces of them"
    unpack(Path(pieces))
    return None


def _tokens(
    report: Report, models: Loaded, prompts: Sequence[Sequence[int]], methods: Sequence[str], num_tokens: int
) -> None:
    """Every method says greedily what plain decoding says, two prompts at a time."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens)
    plain: list[Any] = []
    for method in ("autoregressive", *methods):
        with report.attempt(f"tokens of {method}"):
            engine = Engine(models.target, method=method, draft=models.drafts.get(method), max_batch_size=2)
            said = [completion.token_ids for completion in engine.generate(prompts, sampling)]
            plain = plain or said
            report.check(
                f"the default pair's {method} = plain", said == plain, "" if said == plain else _first(said, plain)
            )


def _against_cpu(report: Report, models: Loaded, prompts: Sequence[Sequence[int]]) -> None:
    """In bfloat16 a near tie may fall otherwise, so that how many tokens are equal is a fact and no check."""
    sampling = SamplingParams(temperature=0, max_tokens=32)
    options: dict[str, Any] = {"dtype": models.target.dtype, "attention": "sdpa", "load_format": "auto"}
    cpu, _ = load_with_drafts(catalogue()["smollm2-135m"].target, (), device="cpu", **options)
    ours, theirs = ([c.token_ids for c in Engine(m).generate(prompts, sampling)] for m in (models.target, cpu))
    told = "the same tokens as on the CPU" if ours == theirs else f"beside the CPU: {_first(ours, theirs)}"
    report.fact(
        "tokens of the CPU", text=f"the default pair in {models.target.dtype} says {told}", ours=ours, theirs=theirs
    )


def _first(ours: list[Any], theirs: list[Any]) -> str:
    """The first difference of two lists of token ids."""
    for row, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if one != other:
            at = next(
                (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
            )
            return f"first difference in row {row} at token {at}"
    return "none"


if __name__ == "__main__":  # for scripts: whether the pair can be used here
    if told := why_not_there():
        raise SystemExit(f"the default pair is left out: {told}")
