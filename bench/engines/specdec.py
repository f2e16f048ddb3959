"""This library's own engine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

import specdec
from bench.engines import PromptResult, Run
from bench.pairs import Pair, folder
from specdec import Completion, Engine, SamplingParams
from specdec.models.causal import CausalLM


class SpecdecEngine:
    """specdec.Engine for each method and gamma, all over the same models."""

    version = specdec.__version__

    def __init__(self, target: CausalLM, draft: CausalLM | None, verification: str) -> None:
        self.tokenizer = target.tokenizer

        @cache
        def engine(method: Any, gamma: int, batch_size: int) -> Engine:
            return Engine(
                target,
                draft=draft if method == "draft_model" else None,
                method=method,
                num_speculative_tokens=gamma,
                max_batch_size=batch_size,
                verification=verification,
            )

        self._engine = engine

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: int, sampling: Sequence[SamplingParams]
    ) -> Run:
        engine = self._engine(method, gamma, len(prompts))
        completions = engine.generate(prompts, sampling)
        return Run(tuple(map(_result, completions)), engine.phase_times)


def load(pair: Pair, dtype: str, device: str, verification: str) -> SpecdecEngine:
    """The pair's models, loaded as `specdec.Engine.load` does."""
    with_draft: dict[str, Any] = {"draft": folder(pair.draft), "method": "draft_model"} if pair.draft else {}
    engine = Engine.load(
        folder(pair.target), dtype=getattr(torch, dtype), device=device, load_format=pair.load_format, **with_draft
    )
    return SpecdecEngine(engine.target, engine.draft, verification)  # type: ignore[arg-type]


def _result(completion: Completion) -> PromptResult:
    return PromptResult(
        completion.token_ids, completion.ttft_s, completion.latency_s, completion.counts, completion.finish_reason
    )
