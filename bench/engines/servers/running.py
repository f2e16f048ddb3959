"""Servers that are already running: SGLang, TensorRT-LLM, and any OpenAI-compatible completions endpoint.

A server has one model and one way of drafting, which cells must match, so a speed-up over plain decoding needs a second
server without speculation. SGLang reports how it drafts and its number format, which are checked; of the others these
are taken on trust, but one address cannot be measured as two methods. Prompts are sent as token ids, or, to a plain
OpenAI endpoint, as a text that encodes to them; its replies are encoded again, and the cell fails unless the numbers of
tokens that the server counts confirm both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.catalogue.pairs import Pair, folder
from bench.engines import counters
from bench.engines.base import LoadOptions, Peers, PromptResult, Run, Served, Setup
from bench.engines.pool import PooledEngine
from bench.engines.servers import formats
from bench.engines.servers.completions import at_once
from bench.engines.servers.formats import Completion, Counted, OpenAIStream, Progress, SGLangStream, Stream
from bench.engines.servers.load_client import send_on_time
from bench.engines.servers.local_server import Server, dropping
from bench.engines.vllm import CALL_TIMEOUT_S, stop_tokens
from bench.records.schema import Gamma
from specdec import SamplingParams
from specdec.conformance.served.dialects import DIALECTS, Dialect, Question, Reply
from specdec.conformance.served.tokens import TokenRecovery, UnclearTokensError
from specdec.models.loading import resolve
from specdec.servers.client import Client, api_key
from specdec.servers.errors import EngineError
from specdec.servers.replies import integer, mapping, parse_object, shown

ALGORITHMS = {  # method -> SGLang's names, of which some are aliases
    "ngram": ("NGRAM",),
    "draft_model": ("STANDALONE",),
    "eagle": ("EAGLE",),
    "eagle3": ("EAGLE3",),
    "mtp": ("EAGLE", "NEXTN"),
    "dflash": ("DFLASH",),
}
DTYPES = {"half": "float16", "float": "float32"}  # SGLang's name -> torch's
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of server. name: of its engine and its dialect. fields: of a request for a stream.

    stream: joins its events. counts: its counters of a completion.
    """

    name: str
    fields: Mapping[str, Any]
    stream: Callable[[Progress], Stream]
    counts: Callable[[Completion], Counted]

    @property
    def dialect(self) -> Dialect:
        return DIALECTS[self.name]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("sglang", {"stream": True}, SGLangStream, formats.sglang_counts),
        Kind("tensorrt-llm", STREAMED, OpenAIStream, formats.tensorrt_counts),
        Kind("openai", STREAMED, OpenAIStream, formats.no_counts),
    )
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server reports about itself. None: not reported.

    is_whole: whether it reports its number format and how it drafts. dtype: as torch names it. gamma: tokens that it
    drafts, 0 for none. depth: levels of its drafts if they are trees.
    """

    version: str | None = None
    is_whole: bool = False
    dtype: str | None = None
    quantization: str | None = None
    algorithm: str | None = None
    gamma: int | None = None
    depth: int | None = None


@dataclass(frozen=True, slots=True)
class Streamed:
    """A completion, and when its tokens arrived."""

    question: Question
    progress: Progress
    answer: Mapping[str, Any]
    reply: Reply


class RunningEngine(PooledEngine[Server[Client]]):
    """A pair's target on servers of one kind; see `BenchEngine`."""

    def __init__(self, kind: Kind, pair: Pair, options: LoadOptions, stop_token_ids: Collection[int]) -> None:
        super().__init__(pair, options, stop_token_ids)
        self._kind = kind
        self._depth: int | None = None
        self._methods: dict[str, tuple[str, Gamma]] = {}  # by address

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, server = self._pool.find(method, gamma, len(prompts))
        questions = self._questions(server, prompts, sampling)
        measures = self._kind.name == "tensorrt-llm" and method != "autoregressive" and len(prompts) == 1
        with dropping(self._pool, setup, server):
            if measures:
                performances(server.client)  # forgets earlier requests
            done = at_once(lambda index, start_s: self._complete(server, questions[index], start_s), len(questions))
            performance = performances(server.client) if measures else []
            alone = performance[0] if len(performance) == 1 else None
            return Run(tuple(self._result(method, each, alone) for each in done))

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
        setup, server = self._pool.find(setup.method, setup.gamma, setup.batch_size)
        questions = self._questions(server, prompts, sampling)
        with dropping(self._pool, setup, server):
            sent = send_on_time(
                lambda index, due_s: self._complete(server, questions[index], due_s),
                arrivals_s,
                limit_s,
                server.client.abort,
                after=after,
                until_s=until_s,
            )
            results = tuple(self._result(setup.method, each, None) if each else None for each in sent.results)
        return Served(results, sent.wall_s, None, sent.refused, None, sent.peak_delay_s, sent.arrivals_s)

    def _questions(
        self, server: Server[Client], prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> list[Question]:
        stops = sorted(self.stop_token_ids)
        return [
            Question(server.model, prompt, self._text(prompt), params.seed, params.max_tokens, checked(params), stops)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]

    def _text(self, prompt: Sequence[int]) -> str:
        """The text to send to a server that takes no token ids; else empty."""
        return "" if self._kind.dialect.takes_token_ids else text_of_tokens(prompt, self.tokenizer)

    def _complete(self, server: Server[Client], question: Question, start_s: float) -> Streamed:
        """Continue a prompt; times are from `start_s`, a reading of time.perf_counter."""
        kind, url = self._kind, server.client.url
        stream = kind.stream(Progress(question.max_tokens))
        for event in server.client.events(kind.dialect.path, kind.dialect.request(question, kind.fields)):
            stream.take(parse_object(event, "an event"), time.perf_counter() - start_s)
        if not stream.progress.has_ended:
            raise EngineError(f"server={url} must finish the completion, but ended the stream; see its log")
        answer = stream.answer()
        return Streamed(question, stream.progress, answer, kind.dialect.reply(answer))

    def _result(self, method: str, done: Streamed, performance: Mapping[str, Any] | None) -> PromptResult:
        tokens, progress = self._tokens(done), done.progress
        completion = Completion(
            done.answer, done.reply, steps(progress, len(tokens)), len(tokens), self._depth, performance
        )
        counts, reason = self._counts(method, completion)
        assert progress.first_s is not None
        assert progress.last_s is not None
        is_step_by_step = counts is not None and len(completion.emitted) == counts.num_steps + 1
        return PromptResult(
            tokens,
            progress.first_s,
            progress.last_s,
            counts,
            done.reply.finish_reason,
            step_tokens=tuple(completion.emitted[1:]) if is_step_by_step else None,
            why_no_counts=reason,
        )

    def _tokens(self, done: Streamed) -> tuple[int, ...]:
        """The tokens of a completion, with a stop token that the server leaves out. Raises EngineError if unclear."""
        reply, is_text = done.reply, done.reply.token_ids is None
        if is_text and None in (reply.num_tokens, reply.num_prompt_tokens):
            raise EngineError(
                "a server of texts must report usage with prompt_tokens and completion_tokens, by which the tokens are "
                "checked; use a server that replies with token ids"
            )
        try:
            tokens = TokenRecovery(self.tokenizer, self._vocab_size, self.stop_token_ids).tokens(done.question, reply)
        except UnclearTokensError as error:
            raise EngineError(f"{error}; use a server that replies with token ids") from None
        if not tokens:
            raise EngineError("the server must continue the prompt, but emitted no token; see its log")
        return tokens

    def _counts(self, method: str, completion: Completion) -> Counted:
        if method != "autoregressive":
            return self._kind.counts(completion)
        quotient = formats.tokens_per_iteration(completion.answer) if self._kind.name == "tensorrt-llm" else None
        if completion.reply.num_drafted or (quotient or 1) > 1 + formats.MAX_DEVIATION:
            raise EngineError(
                "a server of method=autoregressive must not speculate, but does; name one that does not with "
                "--plain-server-url"
            )
        return counters.plain(completion.num_tokens), None

    def _started(self, setup: Setup) -> Server[Client]:
        """The running server of a setup, after checking what it reports about itself."""
        url = self._options.peers.servers.url(self._kind.name, setup.method)
        client = Client(str(url), api_key(), CALL_TIMEOUT_S)
        model = served_model(client, self._pair)
        facts = sglang_facts(client) if self._kind.name == "sglang" else Facts(version_of(client))
        check_facts(client.url, facts, setup, self._options)
        method = self._methods.setdefault(client.url, (setup.method, setup.gamma))
        if method != (setup.method, setup.gamma):
            raise EngineError(
                f"server={client.url} must be measured as one method, and was as method={method[0]}, gamma="
                f"{method[1]}; name the method and gamma that it drafts with, and with --plain-server-url a server "
                "that does not speculate"
            )
        self.version, self.dtype = facts.version or "unknown", facts.dtype or self._options.dtype
        self._depth = facts.depth if setup.method != "autoregressive" else self._depth
        return Server(client, model["id"])


def _load(name: str, pair: Pair, options: LoadOptions) -> RunningEngine:
    """The engine; its servers are checked on first use."""
    return RunningEngine(KINDS[name], pair, options, stop_tokens(resolve(folder(pair.target))))


load_sglang, load_tensorrt, load_openai = (partial(_load, name) for name in KINDS)


def why_missing(engine: str, peers: Peers) -> str | None:
    """Why an engine cannot run, with the remedy; None if it can."""
    if peers.servers.urls.of(engine):
        return None
    return f"engine={engine} needs a running server; name it with --server-url URL, or {engine}=URL among several"


def checked(params: SamplingParams) -> SamplingParams:
    """The parameters. Raises EngineError for stop tokens that a server cannot have: it ends at those of its model."""
    if params.stop_token_ids or params.ignore_eos:
        raise EngineError("a running server ends at the stop tokens of its model; leave out stop_token_ids, ignore_eos")
    return params


def text_of_tokens(prompt: Sequence[int], tokenizer: Any) -> str:
    """A text that a server encodes to these tokens. Raises EngineError if there is none.

    Servers put the tokenizer's special tokens before a text, so that one the prompt begins with is left out.
    """
    if tokenizer is not None:
        for start in (0, 1):
            text = str(tokenizer.decode(prompt[start:], clean_up_tokenization_spaces=False))
            if tuple(tokenizer(text).input_ids) == tuple(prompt):
                return text
    raise EngineError(
        f"a prompt of {len(prompt)} tokens must be sent as a text, but no text encodes to it; use an engine that takes "
        "token ids, or another workload"
    )


def steps(progress: Progress, num_tokens: int) -> list[int]:
    """Tokens by event, with the stop token that a server left out: it belongs to the event that ended the stream."""
    emitted, left_out = list(progress.emitted), num_tokens - sum(progress.emitted)
    if left_out <= 0:
        return emitted
    return [*emitted, left_out] if progress.ended_alone else [*emitted[:-1], emitted[-1] + left_out]


def served_model(client: Client, pair: Pair) -> dict[str, str]:
    """The server's model of the pair's target, found by its name, its source, or the last component of either.

    Raises EngineError if it serves another.
    """
    models = client.models()
    wanted = {pair.target, folder(pair.target), resolve(folder(pair.target)), Path(pair.target).name}
    for model in models:
        served = {model["id"], model["root"]}
        if wanted & (served | {Path(name).name for name in served}):
            return model
    raise EngineError(
        f"server={client.url} must serve target={pair.target} of pair={pair.name}, but serves {models[0]['id']}; use "
        "another --server-url, or --pairs target=MODEL with that model"
    )


def performances(client: Client) -> list[Mapping[str, Any]]:
    """Draft tokens of the requests that TensorRT-LLM finished since this page was read last; empty without the page."""
    try:
        page = parse_object(f'{{"requests": {client.get("/perf_metrics")}}}', "/perf_metrics")["requests"]
    except EngineError:
        return []
    found = []
    for entry in page if isinstance(page, list) else ():
        metrics = mapping(mapping(entry, "/perf_metrics").get("perf_metrics") or {}, "perf_metrics")
        found.append(mapping(metrics.get("speculative_decoding") or {}, "speculative_decoding"))
    return [drafts for drafts in found if drafts] if all(found) else []


def version_of(client: Client) -> str | None:
    """The server's version; None if it does not report one."""
    try:
        return client.version()
    except EngineError:
        return None


def sglang_facts(client: Client) -> Facts:
    """What SGLang reports of its options. Raises EngineError if it reports nothing."""
    try:
        page = client.get("/server_info")
    except EngineError:  # its name before 2026
        page = client.get("/get_server_info")
    info = parse_object(page, "/server_info")
    algorithm, dtype = info.get("speculative_algorithm"), info.get("dtype")
    gamma, depth = (_length(info), _depth(info)) if algorithm else (0, None)
    return Facts(
        version=_word(info, "version"),
        is_whole=True,
        dtype=None if dtype in (None, "auto") else DTYPES.get(str(dtype), str(dtype)),
        quantization=_word(info, "quantization"),
        algorithm=str(algorithm).upper() if algorithm else None,
        gamma=gamma,
        depth=depth,
    )


def _length(info: Mapping[str, Any]) -> int:
    """Tokens of SGLang's drafts, or levels if they are trees."""
    if info.get("speculative_num_steps") is not None:
        return integer(info["speculative_num_steps"], "speculative_num_steps")
    return max(0, integer(info.get("speculative_num_draft_tokens"), "speculative_num_draft_tokens") - 1)


def _depth(info: Mapping[str, Any]) -> int | None:
    """Levels of SGLang's drafts if they are trees: a chain has one token per level, besides the last one emitted."""
    names = ("speculative_num_steps", "speculative_num_draft_tokens")
    levels, tokens = (info.get(name) for name in names)
    if levels is None or tokens is None:
        return None
    levels, tokens = integer(levels, names[0]), integer(tokens, names[1])
    return levels if tokens - 1 != levels else None


def _word(info: Mapping[str, Any], name: str) -> str | None:
    value = info.get(name)
    if not isinstance(value, str | None):
        raise EngineError(f"{name}={shown(value)} must be a string; is this an SGLang server?")
    return value


def check_facts(url: str, facts: Facts, setup: Setup, options: LoadOptions) -> None:
    """Raise EngineError if a server drafts differently from a setup, or has another number format than the options."""
    gamma = 0 if setup.method == "autoregressive" else setup.gamma
    if not facts.is_whole:
        return
    if facts.gamma != gamma:
        raise EngineError(
            f"server={url} must draft gamma={gamma} tokens for method={setup.method}, but drafts {facts.gamma}; use "
            f"{f'--gammas {facts.gamma}' if facts.gamma else '--methods autoregressive'}"
        )
    if facts.algorithm and facts.algorithm not in ALGORITHMS.get(setup.method, ()):
        able = [method for method, names in ALGORITHMS.items() if facts.algorithm in names]
        raise EngineError(
            f"server={url} must speculate by method={setup.method}, but does by {shown(facts.algorithm)}; use "
            f"--methods {' or '.join(able) or 'autoregressive'}"
        )
    stated = options.peers.servers.quantization
    if facts.quantization != stated:
        raise EngineError(
            f"server={url} must have quantization={stated or 'none'}, but has {facts.quantization or 'none'}; state it "
            f"with --server-quantization {facts.quantization or 'none'}"
        )
