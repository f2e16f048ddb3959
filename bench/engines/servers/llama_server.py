"""llama.cpp's server, started here on the loopback interface, with a model in a GGUF file.

Replies are not streamed: in a stream, llama-server leaves out the ids of tokens that end within a character. The time
of the first token is therefore the reply's time less the server's own measure of the decoding after it.

The server counts drafted and accepted tokens per request, and accepted tokens per position over all requests; so only a
prompt decoded alone has counters. Steps follow from the numbers of tokens, unless a stop token ended the output:
llama-server also counts the accepted tokens after it, and the result has no counters.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.catalogue.pairs import Pair, folder
from bench.engines.base import LoadOptions, Peers, PromptResult, Run, Served, Setup
from bench.engines.llama_files import CONVERTER, gguf_file
from bench.engines.pool import PooledEngine
from bench.engines.process import Child
from bench.engines.servers.completions import concurrently
from bench.engines.servers.load_client import send_on_time
from bench.engines.servers.local_server import Server, dropping, free_port, wait_until_healthy
from bench.engines.vllm import CALL_TIMEOUT_S, START_TIMEOUT_S, stop_tokens
from bench.records.schema import Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.conformance.served.dialects import DIALECTS, Question
from specdec.models.loading import resolve
from specdec.servers import metrics
from specdec.servers.client import Client
from specdec.servers.errors import EngineError
from specdec.servers.metrics import accepted_at
from specdec.servers.replies import integer, mapping, shown

PREFIX = "llamacpp:spec_decode_num_"
DIALECT = DIALECTS["llama-server"]
RESPONSE_FIELDS = ["tokens", "stop_type", "truncated", "timings"]  # no text, which would be measured, too
PROGRAM = "llama-server"
LOOKUP_SIZE = 2  # tokens that prompt lookup compares: the fewest that specdec's ngram takes, so the most drafts
# method -> options of llama-server besides the draft length
DRAFTING = {
    "ngram": "--spec-type ngram-simple --spec-ngram-simple-size-n {lookup} --spec-ngram-simple-size-m {gamma}",
    "ngram_map_k": "--spec-type ngram-map-k --spec-ngram-map-k-size-n {lookup} --spec-ngram-map-k-size-m {gamma}",
    "ngram_mod": "--spec-type ngram-mod --spec-ngram-mod-n-match {lookup} --spec-ngram-mod-n-min 1 "
    "--spec-ngram-mod-n-max {gamma}",
    "ngram_cache": "--spec-type ngram-cache",
    "draft_model": "--spec-type draft-simple --spec-draft-p-min 0 --spec-draft-sampling probabilistic",
}


class LlamaServerEngine(PooledEngine[Server[Client]]):
    """llama-server for a pair: one server per setup, at most two at a time."""

    def __init__(self, pair: Pair, options: LoadOptions, program: Path, stop_token_ids: Collection[int]) -> None:
        super().__init__(pair, options, stop_token_ids)
        self._program = program

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, server = self._pool.find(method, gamma, len(prompts))
        asked = self._asked(prompts, sampling)
        with dropping(self._pool, setup, server):
            before = accepted_at(server.client.get("/metrics"), PREFIX)
            replies = concurrently(lambda index, start_s: complete(server.client, asked[index], start_s), len(asked))
            after = accepted_at(server.client.get("/metrics"), PREFIX)
            grown = difference(after, before) if len(asked) == 1 else None
        return Run(tuple(result(reply, grown, method != "autoregressive") for reply in replies))

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
        asked = self._asked(prompts, sampling)
        with dropping(self._pool, setup, server):
            sent = send_on_time(
                lambda index, due_s: complete(server.client, asked[index], due_s),
                arrivals_s,
                limit_s,
                server.client.abort,
                after=after,
                until_s=until_s,
            )
        is_drafting = setup.method != "autoregressive"
        results = tuple(result(reply, None, is_drafting) if reply else None for reply in sent.results)
        return Served(results, sent.wall_s, None, sent.refused, None, sent.peak_delay_s, sent.arrivals_s)

    def _asked(self, prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]) -> list[Asked]:
        pairs = zip(prompts, sampling, strict=True)
        return [
            Asked(request(prompt, params, self.stop_token_ids), params.max_tokens, self._vocab_size)
            for prompt, params in pairs
        ]

    def _started(self, setup: Setup) -> Server[Client]:
        address = ("127.0.0.1", free_port())
        command = [str(self._program), *arguments(self._pair, self._options, setup, self._program, address)]
        child = Child(f"engine=llama-server, {setup}", command, dict(os.environ), all_output=True)
        client = Client("http://{}:{}".format(*address), None, CALL_TIMEOUT_S)
        try:
            wait_until_healthy(client, child, START_TIMEOUT_S)
            self.version = installed_version(self._program)
            return Server(client, self._pair.target, child)
        except BaseException:
            child.close()
            raise


def load(pair: Pair, options: LoadOptions) -> LlamaServerEngine:
    """The engine; servers are started on first use. Raises EngineError if the program is missing."""
    program = find_program(options.peers.llama.program)
    if program is None:
        raise EngineError(why_missing("llama-server", options.peers) or "")
    return LlamaServerEngine(pair, options, program, stop_tokens(resolve(folder(pair.target))))


def find_program(program: Path | None) -> Path | None:
    """The path of llama-server: the given one, else that on PATH; None if there is none."""
    found = program or shutil.which(PROGRAM)
    return Path(found) if found else None


def why_missing(engine: str, peers: Peers) -> str | None:
    """Why llama-server cannot be run, with the remedy; None if it can."""
    if find_program(peers.llama.program):
        return None
    return (
        f"engine={engine} needs the program {PROGRAM}, which is not on PATH; install llama.cpp, or build it with "
        "python -m bench.tools.build_llama_server FOLDER, and name it with --llama-server"
    )


def version_of(program: Path | None) -> str | None:
    """The version of the program that would be run; None if there is none."""
    found = find_program(program)
    return installed_version(found) if found else None


@cache
def installed_version(program: Path) -> str:
    """The build number and commit that llama-server reports."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version: ")]
    if not lines:
        raise EngineError(f"{program} --version must name its version, but printed {done.stderr[:200]!r}")
    return lines[0].removeprefix("version: ")


def arguments(pair: Pair, options: LoadOptions, setup: Setup, program: Path, address: tuple[str, int]) -> list[str]:
    """The command line of llama-server for a setup."""
    number_format = options.quantization or options.dtype
    converter = program.with_name(CONVERTER)  # in the same folder
    context = pair.context or 0
    words = ["--model", str(gguf_file(pair.target, number_format, converter))]
    words += ["--host", address[0], "--port", str(address[1]), "--no-webui", "--metrics"]
    words += ["--parallel", str(setup.batch_size), "--ctx-size", str(context * setup.batch_size), "--no-kv-unified"]
    # prompts repeat in warm-ups and in every cell, and other engines do not cache them
    words += ["--cache-ram", "0", "--threads", str(torch.get_num_threads())]
    return words + _drafting(pair, options, setup, converter) + shlex.split(options.peers.llama.options)


def _drafting(pair: Pair, options: LoadOptions, setup: Setup, converter: Path) -> list[str]:
    if setup.method == "autoregressive":
        return ["--spec-type", "none"]
    words = shlex.split(DRAFTING[setup.method].format(gamma=setup.gamma, lookup=LOOKUP_SIZE))
    words += ["--spec-draft-n-max", str(setup.gamma)]
    if setup.method == "draft_model" and (draft := pair.draft_for(setup.method)):
        words += ["--model-draft", str(gguf_file(draft, options.quantization or options.dtype, converter))]
    if rates := options.padded_rates(setup.gamma):
        words += ["--spec-synth-rates", ",".join(map(str, rates))]
    return words


def request(prompt: Sequence[int], params: SamplingParams, stop_token_ids: Collection[int]) -> dict[str, Any]:
    """A request for a completion with the same distribution as specdec's.

    Raises EngineError for stop tokens that the server cannot have: it ends at those of the GGUF file.
    """
    if params.stop_token_ids or (params.ignore_eos and stop_token_ids):
        raise EngineError(
            "engine=llama-server ends at the stop tokens of its GGUF file and at no others, and makes them impossible "
            "if they are to be ignored; leave out stop_token_ids and ignore_eos"
        )
    question = Question("", prompt, "", params.seed, params.max_tokens, params, ())
    fields = {"cache_prompt": False, "stream": False, "response_fields": RESPONSE_FIELDS}
    return DIALECT.request(question, fields)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the bounds of its reply."""

    body: Mapping[str, Any]
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply. latency_s: since the start. decoding_s: of these, after the first token, by the server's clock."""

    token_ids: tuple[int, ...]
    latency_s: float
    decoding_s: float
    num_drafted: int
    num_accepted: int
    finish_reason: str


def complete(client: Client, asked: Asked, start_s: float) -> Reply:
    """Continue a prompt; times are from `start_s`, a reading of time.perf_counter. Raises EngineError."""
    answer = client.post("/completion", asked.body)
    latency_s = time.perf_counter() - start_s
    reply = DIALECT.reply(answer)
    token_ids = tuple(integer(token, "tokens", asked.vocab_size) for token in reply.token_ids or ())
    if not 0 < len(token_ids) <= asked.max_tokens:
        raise EngineError(
            f"the server must emit 1 to {asked.max_tokens} tokens, but emitted {len(token_ids)}; see its log"
        )
    timings = mapping(answer.get("timings"), "timings")
    return Reply(
        token_ids,
        latency_s,
        _seconds(timings.get("predicted_ms"), latency_s),
        reply.num_drafted or 0,
        reply.num_accepted or 0,
        reply.finish_reason,
    )


def _seconds(milliseconds: Any, limit_s: float) -> float:
    """The time of decoding, checked: less than the whole."""
    if not isinstance(milliseconds, int | float) or not 0 <= milliseconds / 1000 <= limit_s:
        raise EngineError(f"predicted_ms={shown(milliseconds)} must lie within the {limit_s:.3f} s that the reply took")
    return milliseconds / 1000


def difference(after: Sequence[int], before: Sequence[int]) -> list[int]:
    """The increase of each counter; the page has none before the first draft. Raises EngineError if one decreased."""
    padded = [*before, *[0] * (len(after) - len(before))]
    return list(metrics.difference({"accepted_at": after}, {"accepted_at": padded})["accepted_at"])


def result(reply: Reply, grown: Sequence[int] | None, is_drafting: bool) -> PromptResult:
    """The result of a prompt. grown: accepted tokens per position during it; None if others were decoded beside it."""
    counts, reason = _counts(reply, grown if is_drafting else [])
    return PromptResult(
        token_ids=reply.token_ids,
        ttft_s=reply.latency_s - reply.decoding_s,
        latency_s=reply.latency_s,
        counts=counts,
        finish_reason=reply.finish_reason,
        why_no_counts=reason,
    )


def _counts(reply: Reply, grown: Sequence[int] | None) -> tuple[AcceptanceCounts | None, str | None]:
    """Counters by specdec's definitions, or why they are not known exactly."""
    if grown is None:
        return None, "llama-server counts accepted tokens of all requests together; use --batch-sizes 1"
    if reply.finish_reason == "stop" and reply.num_accepted:
        return None, "llama-server also counts the accepted tokens after a stop token"
    num_emitted = len(reply.token_ids) - 1  # the prompt's step emits the first
    num_steps = num_emitted - reply.num_accepted
    if num_steps < 0 or sum(grown) != reply.num_accepted:
        raise EngineError(
            f"draft_n_accepted={reply.num_accepted} must be the sum of {list(grown)}, less than the "
            f"{len(reply.token_ids)} emitted tokens; does this version of llama-server count differently?"
        )
    counts = AcceptanceCounts(
        num_steps=num_steps,
        num_drafted=reply.num_drafted,
        num_accepted=reply.num_accepted,
        num_emitted=num_emitted,
        num_slots=reply.num_drafted + num_steps,
        accepted_at=list(grown),
    )
    return counts, None
