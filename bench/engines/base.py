"""The interface of an engine in the benchmark: its options, its methods and its results."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from specdec import AcceptanceCounts, PhaseTimes, SamplingParams

from bench.records.schema import Gamma
from specdec.servers.errors import EngineError as EngineError


@dataclass(frozen=True, slots=True)
class Setup:
    """A decoding configuration; some engines need a process or server for each."""

    method: str
    gamma: Gamma
    batch_size: int

    def __str__(self) -> str:
        return f"method={self.method}, gamma={self.gamma}, batch_size={self.batch_size}"


@dataclass(frozen=True, slots=True)
class PromptResult:
    """An engine's result for one prompt.

    token_ids: emitted tokens, including a stop token. ttft_s, latency_s: from the start of the request to its first and
    last token. counts: acceptance counters by specdec's definitions, or None if the engine does not report them.
    finish_reason: "stop" or "length". queue_s: time waiting for a slot, included in both times; None if not reported.
    step_tokens: tokens emitted by each decode step, in order; None if not reported. why_no_counts: why counts is None.
    """

    token_ids: tuple[int, ...]
    ttft_s: float
    latency_s: float
    counts: AcceptanceCounts | None
    finish_reason: str
    queue_s: float | None = None
    step_tokens: tuple[int, ...] | None = None
    why_no_counts: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """One call of an engine: a result per prompt, in order, and the time per phase if the engine reports it."""

    results: tuple[PromptResult, ...]
    phase_times: PhaseTimes | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """The results of requests that arrived over time.

    results: one per request, in order, with times from its arrival; None for an unfinished one. refused: indices of
    unfinished requests that the engine refused. wall_s: until the last request was finished, or the time limit.
    queue_s: mean wait for a slot, for engines that do not report it per request. peak_send_delay_s: largest delay in
    sending a request. arrivals_s: when each request arrived, None for one that did not within `until_s`; None if all
    arrived at the times asked for.
    """

    results: tuple[PromptResult | None, ...]
    wall_s: float
    phase_times: PhaseTimes | None = None
    refused: frozenset[int] = frozenset()
    queue_s: float | None = None
    peak_send_delay_s: float | None = None
    arrivals_s: tuple[float | None, ...] | None = None


class BenchEngine(Protocol):
    """Decodes prompts with one loaded pair of models by any of its methods."""

    version: str
    tokenizer: Any  # the target's transformers tokenizer, or None
    dtype: str  # of the weights, as torch names it
    stop_token_ids: frozenset[int]  # the model's own, unless they are ignored

    def prepare(self, setups: Collection[Setup]) -> None:
        """Prepare for the setups of the next cell, and release resources of other setups.

        Engines also clear state from earlier prompts, if they can. Raises EngineError on failure.
        """
        ...

    def settle(self) -> None:
        """Wait until the engine no longer uses the machine after a call."""
        ...

    def close(self) -> None:
        """Stop the processes that it started."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        """Continue all prompts, given as token ids, together.

        method: one of the engine's methods. gamma: tokens proposed per step, 0 for "autoregressive", or "auto" for an
        adaptive number. sampling: one per prompt. Requires `prepare` with this setup.
        Raises EngineError if the engine fails.
        """
        ...


class ServingEngine(BenchEngine, Protocol):
    """An engine that accepts requests while it decodes others; its kind has the extra "arrivals"."""

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
        """Continue each prompt from its arrival, in seconds from the call; abort unfinished requests at `limit_s`.

        setup: a prepared one; its batch size limits the requests decoded at once. after: index of the earlier request
        that each follows: it arrives `arrivals_s` after that one's answer. until_s: requests that arrive later have no
        result; the call ends when all others have one. See `bench.engines.following`. Raises EngineError.
        """
        ...


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """How to run vLLM. python: the interpreter that has it; None for the current one. options: vLLM options as JSON."""

    python: Path | None = None
    options: str = "{}"


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """How to run llama.cpp's server. program: None for `llama-server` on PATH. options: words of its command line."""

    program: Path | None = None
    options: str = ""


@dataclass(frozen=True, slots=True)
class Urls:
    """Addresses of running servers, each with the engine that it is for; the engine "" stands for all others."""

    by_engine: tuple[tuple[str, str], ...] = ()

    def of(self, engine: str) -> str | None:
        """The address for an engine; None if there is none."""
        found = dict(self.by_engine)
        return found.get(engine) or found.get("")

    def __str__(self) -> str:
        return ",".join(f"{engine}={url}" if engine else url for engine, url in self.by_engine)


@dataclass(frozen=True, slots=True)
class RunningServers:
    """Servers that somebody else started. plain: those that do not speculate; without one, `urls` serves every method.

    quantization: of their weights, as the servers name it; None if they are not quantized.
    """

    urls: Urls = field(default_factory=Urls)
    plain: Urls = field(default_factory=Urls)
    quantization: str | None = None

    def url(self, engine: str, method: str) -> str | None:
        """The address that serves a method; None if the engine has no running server."""
        found = self.urls.of(engine)
        return (found and method == "autoregressive" and self.plain.of(engine)) or found


@dataclass(frozen=True, slots=True)
class Peers:
    """How to run the other engines. openvino_python: the interpreter that has openvino-genai; None for this one."""

    vllm: VllmOptions = field(default_factory=VllmOptions)
    llama: LlamaOptions = field(default_factory=LlamaOptions)
    openvino_python: Path | None = None
    servers: RunningServers = field(default_factory=RunningServers)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load a pair's models and verify drafts.

    dtype, device: torch names. quantization: as for `specdec.models.loading`. rates_by_gamma: prescribed acceptance
    rates where they depend on gamma.
    """

    dtype: str
    device: str
    verification: str = "token"
    synthetic_acceptance_rates: tuple[float, ...] = ()
    peers: Peers = field(default_factory=Peers)
    quantization: str | None = None
    rates_by_gamma: tuple[tuple[Gamma, tuple[float, ...]], ...] = ()

    def prescribed_rates(self, gamma: Gamma) -> tuple[float, ...]:
        """The prescribed acceptance rate of each position; empty for real drafts."""
        return dict(self.rates_by_gamma).get(gamma, self.synthetic_acceptance_rates)

    def padded_rates(self, gamma: Gamma) -> list[float]:
        """The same for exactly `gamma` positions, as other engines take them: 0 where none is prescribed."""
        rates = self.prescribed_rates(gamma)
        if not rates:
            return []
        assert isinstance(gamma, int)
        return [*rates[:gamma], *[0.0] * (gamma - len(rates))]
