"""The seam to an engine that decodes prompts: what it is given, what it returns, what it must do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from specdec import AcceptanceCounts, PhaseTimes, SamplingParams

from bench.records.schema import Gamma


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

        method: one of the engine's methods. gamma: tokens proposed per step, 0 for "autoregressive". "auto": as
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
class VllmOptions:
    """How vLLM is had. python: the interpreter that runs it; None is this one. options: JSON, its own options.

    server_url: a server that is up; None starts one.
    """

    python: Path | None = None
    options: str = "{}"
    server_url: str | None = None


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a pair's models are loaded and its drafts verified.

    dtype, device: names that torch knows. quantization: as for `specdec.models.loading`.
    """

    dtype: str
    device: str
    verification: str = "token"
    synthetic_acceptance_rates: tuple[float, ...] = ()
    vllm: VllmOptions = field(default_factory=VllmOptions)
    quantization: str | None = None
