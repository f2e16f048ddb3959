"""This library's engine."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import cache
from typing import Any

import torch

import specdec
from bench.catalogue.pairs import Pair, folder
from bench.engines.base import LoadOptions, PromptResult, Run, Served, Setup
from bench.engines.following import Following
from bench.records.schema import Gamma
from specdec import Completion, Engine, SamplingParams
from specdec.drafts import load_with_drafts
from specdec.methods import METHODS
from specdec.models.causal import CausalLM
from specdec.models.seq2seq import Seq2SeqLM


class SpecdecEngine:
    """One specdec.Engine per method, gamma and batch size, with shared models. drafts: by their source in the pair."""

    version = specdec.__version__

    def __init__(
        self, target: CausalLM | Seq2SeqLM, pair: Pair, drafts: Mapping[str, Any], options: LoadOptions
    ) -> None:
        self.target, self.tokenizer = target, target.tokenizer
        self._pair, self._drafts = pair, drafts
        self.dtype, self.stop_token_ids = str(target.dtype).removeprefix("torch."), target.eos_token_ids

        self._engines: list[Engine] = []

        @cache
        def engine(method: Any, gamma: Gamma, batch_size: int) -> Engine:
            made = Engine(
                target,
                draft=self.draft_for(method),
                method=method,
                num_speculative_tokens=gamma,
                max_batch_size=batch_size,
                verification=options.verification,
                synthetic_acceptance_rates=options.prescribed_rates(gamma) or None,
            )
            self._engines.append(made)
            return made

        self._engine = engine

    def draft_for(self, method: str) -> Any:
        """The pair's draft for a method, None if the method needs none."""
        source = self._pair.draft_for(method)
        return self._drafts[source] if source else None

    def prepare(self, setups: Collection[Setup]) -> None:
        """Clear the engines' state from earlier prompts; all setups share the models."""
        for engine in self._engines:
            engine.forget()

    def settle(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to stop."""

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        engine = self._engine(method, gamma, len(prompts))
        completions = engine.generate(prompts, sampling)
        return Run(tuple(map(_result, completions)), engine.phase_times)

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        arrivals_s: Sequence[float],
        setup: Setup,
        sampling: Sequence[SamplingParams],
        limit_s: float,
        *,
        after: Sequence[int | None] | None = None,
        until_s: float = math.inf,
    ) -> Served:
        following = Following(arrivals_s, after, until_s)
        engine = self._engine(setup.method, setup.gamma, setup.batch_size)
        results: list[PromptResult | None] = [None] * len(prompts)
        start_s = time.perf_counter()
        with closing(engine.as_completed(prompts, sampling, arrivals_s=arrivals_s, after=after)) as completions:
            for completion in completions:
                if time.perf_counter() - start_s > limit_s:
                    break
                results[completion.index] = _result(completion)
                following.finish(completion.index, following.due_s[completion.index] + completion.latency_s)
                if following.is_over:
                    break
        times_s = following.arrivals_s()
        counted = tuple(result if at is not None else None for result, at in zip(results, times_s, strict=True))
        return Served(counted, time.perf_counter() - start_s, engine.phase_times, arrivals_s=times_s)


def load(pair: Pair, options: LoadOptions) -> SpecdecEngine:
    """The pair's models, loaded as `specdec.Engine.load` does."""
    sources = {source: folder(source) for method in METHODS if (source := pair.draft_for(method))}
    target, drafts = load_with_drafts(
        folder(pair.target),
        set(sources.values()),
        pair.placement,
        dtype=getattr(torch, options.dtype),
        device=options.device,
        attention=pair.attention,
        load_format=pair.load_format,
        quantization=options.quantization,
    )
    return SpecdecEngine(target, pair, {name: drafts[source] for name, source in sources.items()}, options)


def _result(completion: Completion) -> PromptResult:
    return PromptResult(
        completion.token_ids,
        completion.ttft_s,
        completion.latency_s,
        completion.counts,
        completion.finish_reason,
        completion.queue_s,
        tuple(step.num_emitted for step in completion.steps),
    )
