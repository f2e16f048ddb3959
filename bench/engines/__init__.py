"""The seam to an engine that decodes prompts, and which engines there are."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from bench.pairs import Pair
    from specdec import AcceptanceCounts, PhaseTimes, SamplingParams

Gamma = int | Literal["auto"]
METHODS = (
    *("autoregressive", "ngram", "ngram_store", "ngram_table", "suffix"),
    *("draft_model", "eagle", "early_exit", "hybrid", "tree"),
)
# vLLM's own, by its names; whether the installed version has one is seen when its engine starts
VLLM_DRAFTS = ("eagle3", "medusa", "mlp_speculator", "dflash", "dspark")
VLLM_METHODS = ("ngram_gpu", "mtp", *VLLM_DRAFTS)


class EngineError(RuntimeError):
    """An engine cannot do what a cell asks of it; the others go on. The message names it, and the remedy."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How an engine is to decode: what an engine may need a process or a server of its own for."""

    method: str
    gamma: Gamma
    batch_size: int

    def __str__(self) -> str:
        return f"method={self.method}, gamma={self.gamma}, batch_size={self.batch_size}"


@dataclass(frozen=True, slots=True)
class PromptResult:
    """What an engine made of one prompt.

    token_ids: emitted tokens, a stop token included. ttft_s, latency_s: from the request's start to its first and
    last token. counts: acceptance counters by specdec's definitions, or None if the engine does not tell.
    finish_reason: "stop" or "length". queue_s: of both times, what it waited for a slot, if the engine tells.
    """

    token_ids: tuple[int, ...]
    ttft_s: float
    latency_s: float
    counts: AcceptanceCounts | None
    finish_reason: str
    queue_s: float | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One call of an engine: a result per prompt, in order, and where the time went, if the engine tells."""

    results: tuple[PromptResult, ...]
    phase_times: PhaseTimes | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What became of requests that arrived over time.

    results: one per request, in order, its times from its arrival; None for one that was not finished in time.
    refused: of those, the indices of what was not taken. wall_s: from the beginning until the last was done, or time
    was up. queue_s: mean wait for a slot, where the engine tells no more. peak_send_delay_s: how late a client was.
    """

    results: tuple[PromptResult | None, ...]
    wall_s: float
    phase_times: PhaseTimes | None = None
    refused: frozenset[int] = frozenset()
    queue_s: float | None = None
    peak_send_delay_s: float | None = None


class BenchEngine(Protocol):
    """Decodes prompts with one loaded pair of models by any of its methods."""

    version: str
    tokenizer: Any  # the target's transformers tokenizer, or None
    dtype: str  # of the weights, as torch names it
    stop_token_ids: frozenset[int]  # the model's own, unless they are ignored

    def prepare(self, setups: Collection[Setup]) -> None:
        """Be ready for these, which a cell is about to use, and let go of what only others needed.

        What earlier prompts left with an engine is forgotten, if it can be. Raises EngineError if it cannot be ready.
        """
        ...

    def settle(self) -> None:
        """Return when it no longer keeps the machine busy after a call."""
        ...

    def close(self) -> None:
        """End what it started."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        """Continue all prompts, given as token ids, together.

        method: one of METHODS or VLLM_METHODS. gamma: tokens proposed per step, 0 for "autoregressive". "auto": as
        many as pay. sampling: one per prompt. They must have been prepared for.
        Raises EngineError if the engine fails.
        """
        ...


class ServingEngine(BenchEngine, Protocol):
    """An engine that takes requests while it decodes others: one that has "arrivals" among its extras."""

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        arrivals_s: Sequence[float],
        setup: Setup,
        sampling: Sequence[SamplingParams],
        limit_s: float,
    ) -> Served:
        """Continue each prompt from its arrival on, in seconds from the call; give up what is not done at `limit_s`.

        setup: prepared for; as many as its batch size are decoded together at the most. Raises EngineError.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineKind:
    """What is known of an engine before it is loaded.

    max_batch_size: None is unlimited. extras: what few have. kinds: those of pairs that it decodes.
    """

    package: str
    methods: tuple[str, ...]
    max_batch_size: int | None = None
    verifications: tuple[str, ...] = ("token",)
    extras: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("decoder-only",)


ENGINES = {
    "specdec": EngineKind(
        "specdec",
        METHODS,
        None,
        ("token", "block", "coupled"),
        ("auto gamma", "synthetic acceptance", "placements", "other vocabularies", "arrivals"),
        ("decoder-only", "encoder-decoder"),
    ),
    "transformers": EngineKind(
        "transformers",
        ("autoregressive", "ngram", "draft_model"),
        max_batch_size=1,
        extras=("placements",),
        kinds=("decoder-only", "local-attention", "encoder-decoder"),
    ),
    "vllm": EngineKind(
        "vllm",
        ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
        verifications=("token", "block"),
        extras=("synthetic acceptance", "interpreter"),
    ),
    "vllm-server": EngineKind(
        "vllm",
        ("autoregressive", "ngram", "suffix", "draft_model", "eagle", *VLLM_METHODS),
        verifications=("token", "block"),
        extras=("synthetic acceptance", "interpreter", "arrivals"),
    ),
}


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How vLLM is had. python: the interpreter that runs it; None is this one. options: JSON, its own options.

    server_url: a server that is up; None starts one.
    """

    python: Path | None = None
    options: str = "{}"
    server_url: str | None = None


def why_not(
    engine: str, method: str, batch_size: int, verification: str = "token", vllm: VllmOptions | None = None
) -> str | None:
    """Why an engine cannot run a cell, and what to do about it; None if it can."""
    kind = ENGINES[engine]
    if missing := _why_missing(engine, vllm or VllmOptions()):
        return missing
    if method not in kind.methods:
        return f"engine={engine} has no method={method}; use {', '.join(kind.methods)}"
    if method == "tree" and verification == "block":
        return "method=tree has no verification=block; use --verification token or coupled"
    if method != "autoregressive" and verification not in kind.verifications:
        return (
            f"engine={engine} has no verification={verification}; use --verification {' or '.join(kind.verifications)}"
        )
    if kind.max_batch_size is not None and batch_size > kind.max_batch_size:
        return (
            f"engine={engine} decodes at most {kind.max_batch_size} prompt at a time, not "
            f"batch_size={batch_size}; use --batch-sizes {kind.max_batch_size}"
        )
    return None


def why_not_pair(engine: str, pair: Pair, placement: str) -> str | None:
    """Why an engine cannot decode a pair, or not so placed, and what to do about it; None if it can."""
    kind = ENGINES[engine]
    if pair.kind not in kind.kinds:
        able = [name for name, each in ENGINES.items() if pair.kind in each.kinds]
        remedy = f"use --engines {','.join(able)}" if able else "no engine does yet; use another pair"
        return f"engine={engine} takes no models of kind {pair.kind}, as pair={pair.name} is; {remedy}"
    if placement != "same" and "placements" not in kind.extras:
        return (
            f"engine={engine} places models by itself, not by placement={placement}; use --placements same and "
            "--vllm-options such as tensor_parallel_size"
        )
    return None


def _why_missing(engine: str, vllm: VllmOptions) -> str | None:
    package = ENGINES[engine].package
    if engine == "vllm-server" and vllm.server_url:
        return None
    if "interpreter" in ENGINES[engine].extras:
        from bench.engines.vllm import why_no_interpreter

        return why_no_interpreter(engine, vllm.python)
    if importlib.util.find_spec(package) is None:
        return f"engine={engine} needs the package {package}; pip install {package}"
    return None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a pair's models are loaded and its drafts verified.

    dtype, device: names that torch knows. quantisation: as for `specdec.models.loading`.
    """

    dtype: str
    device: str
    verification: str = "token"
    synthetic_acceptance_rates: tuple[float, ...] = ()
    vllm: VllmOptions = field(default_factory=VllmOptions)
    quantisation: str | None = None


def load(engine: str, pair: Pair, options: LoadOptions) -> BenchEngine:
    """An engine with a pair's models in memory."""
    module = importlib.import_module(f"bench.engines.{engine.replace('-', '_')}")
    loaded: BenchEngine = module.load(pair, options)
    return loaded
