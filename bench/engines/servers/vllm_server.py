"""vLLM as a server: an existing one, or one started here on the loopback interface.

A running server (--server-url) has one model and one drafting configuration, which cells must match; properties that it
does not report, such as its dtype, are not verified. Tokens are counted from the stream: if an event contains the
tokens of several steps, steps cannot be counted, and the cell has no acceptance statistics.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from bench.catalogue.pairs import Pair, folder
from bench.engines.base import EngineError, LoadOptions, PromptResult, Run, Served, Setup
from bench.engines.counters import acceptance
from bench.engines.pool import PooledEngine
from bench.engines.process import Child, foreign_environment
from bench.engines.servers.completions import Client, at_once
from bench.engines.servers.load_client import send_on_time
from bench.engines.servers.local_server import Server, dropping, free_port, wait_until_healthy
from bench.engines.servers.running import served_model
from bench.engines.servers.streams import Row
from bench.engines.vllm import (
    CALL_TIMEOUT_S,
    SCRIPT,
    START_TIMEOUT_S,
    configuration,
    preloads,
    sampling_arguments,
    stop_tokens,
)
from bench.records.schema import Gamma
from specdec import AcceptanceCounts, SamplingParams
from specdec.conformance.served.dialects import DIALECTS, Question
from specdec.models.loading import resolve
from specdec.servers.client import api_key
from specdec.servers.metrics import difference

NAME = "vllm-server"
BUSY_WAIT_S = 1.2  # an idle server's processes spin for a second, each occupying a CPU


class VllmServerEngine(PooledEngine[Server[Client]]):
    """vLLM servers for a pair: those that are running, or one per setup, at most two at a time."""

    def __init__(self, pair: Pair, options: LoadOptions, stop_token_ids: Collection[int]) -> None:
        is_running = options.peers.servers.urls.of(NAME)
        super().__init__(pair, options, stop_token_ids, self._found if is_running else self._started)
        self._busy_until_s = 0.0

    def settle(self) -> None:
        time.sleep(max(0.0, self._busy_until_s - time.monotonic()))

    def generate(
        self, prompts: Sequence[Sequence[int]], method: str, gamma: Gamma, sampling: Sequence[SamplingParams]
    ) -> Run:
        setup, server = self._pool.find(method, gamma, len(prompts))
        requests = self._requests(server, prompts, sampling)
        try:
            with dropping(self._pool, setup, server):
                return run(server.client, requests)
        finally:
            self._busy_until_s = time.monotonic() + BUSY_WAIT_S

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
        requests = self._requests(server, prompts, sampling)
        try:
            with dropping(self._pool, setup, server):
                return serve(server.client, requests, arrivals_s, limit_s, after=after, until_s=until_s)
        finally:
            self._busy_until_s = time.monotonic() + BUSY_WAIT_S

    def _requests(
        self, server: Server[Client], prompts: Sequence[Sequence[int]], sampling: Sequence[SamplingParams]
    ) -> list[dict[str, Any]]:
        return [
            request(server.model, prompt, params, self.stop_token_ids)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]

    def _found(self, setup: Setup) -> Server[Client]:
        """The running server, after checking that it serves the pair's target and drafts as in the setup."""
        url = self._options.peers.servers.url(NAME, setup.method)
        client = Client(str(url), api_key(), CALL_TIMEOUT_S, self._vocab_size)
        model = served_model(client, self._pair)
        check_drafting(client.url, client.counters(), setup)
        self.version = client.version()
        return Server(client, model["id"])

    def _started(self, setup: Setup) -> Server[Client]:
        python = str(self._options.peers.vllm.python or sys.executable)
        address = {"host": "127.0.0.1", "port": free_port()}
        config = configuration(self._pair, self._options, setup) | {"address": address}
        config["engine"].pop("skip_tokenizer_init")
        config["engine"].pop("disable_log_stats")
        command = [python, str(SCRIPT.with_name("vllm_server.py")), json.dumps(config)]
        environment = server_environment(python, self._options.device)
        child = Child(f"engine=vllm-server, {setup}", command, environment, all_output=True)
        url, key = "http://{host}:{port}".format(**address), environment.get("VLLM_API_KEY")
        client = Client(url, key, CALL_TIMEOUT_S, self._vocab_size)
        try:
            wait_until_healthy(client, child, START_TIMEOUT_S)
            self.version = client.version()
            return Server(client, client.model()["id"], child)
        except BaseException:
            child.close()
            raise


def load(pair: Pair, options: LoadOptions) -> VllmServerEngine:
    """The engine; servers are started or checked on first use."""
    return VllmServerEngine(pair, options, stop_tokens(resolve(folder(pair.target))))


def server_environment(python: str, device: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables of a server, such that it binds its threads to all CPUs, as other engines use them."""
    own = foreign_environment(environment)
    own["VLLM_NO_USAGE_STATS"] = "1"
    if key := api_key(environment) or api_key(environment, "VLLM_API_KEY"):
        own["VLLM_API_KEY"] = key
    if device.startswith("cuda"):
        return own
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    binding = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))} if cpus else {}
    return {"VLLM_CPU_KVCACHE_SPACE": "1", **binding, **own, **preloads(python, own)}


def check_drafting(url: str, counters: Mapping[str, Any], setup: Setup) -> None:
    """Raise EngineError if a server's counters show another draft length. Servers do not report the method."""
    found = len(counters.get("accepted_at", ()))
    expected = setup.gamma if setup.method != "autoregressive" else 0
    if found != expected:
        raise EngineError(
            f"server={url} must draft gamma={expected} tokens for method={setup.method}, but drafts {found}; "
            f"use {'--methods with its method and ' if found else ''}"
            f"{f'--gammas {found}' if found else '--methods autoregressive'}"
        )


def request(
    model: str, prompt: Sequence[int], params: SamplingParams, stop_token_ids: Collection[int]
) -> dict[str, Any]:
    """A request for a streamed completion with the same distribution as specdec's, with token ids in both directions.

    stop_token_ids: the model's own; all are sent, so that every engine stops at the same tokens.
    """
    question = Question(model, prompt, "", params.seed, params.max_tokens, params, ())
    stops = sampling_arguments(params, stop_token_ids)
    ends = {"ignore_eos": stops["ignore_eos"], "stop_token_ids": stops["stop_token_ids"]}
    return DIALECTS["vllm"].request(question, ends | {"stream": True, "stream_options": {"include_usage": True}})


def run(client: Client, requests: Sequence[Mapping[str, Any]]) -> Run:
    """Make concurrent requests; retries all of them if the server is busy."""
    before = client.counters()
    rows = at_once(lambda index, start_s: client.complete_one(requests[index], start_s), len(requests))
    after = client.counters()
    # the server's counters are those of the prompt if it was the only one, and nobody else used the server
    is_alone = after["num_finished"] - before["num_finished"] == len(requests) == 1 and "num_drafts" in after
    drafts = difference(after, before) if is_alone else None
    return Run(tuple(_result(row, row.drafts or drafts, "num_drafts" in after) for row in rows))


def serve(
    client: Client,
    requests: Sequence[Mapping[str, Any]],
    arrivals_s: Sequence[float],
    limit_s: float,
    *,
    after: Sequence[int | None] | None = None,
    until_s: float = math.inf,
) -> Served:
    """Send each request at its arrival time; requests refused by a busy server are not retried."""
    queue_before = client.queue()
    sent = send_on_time(
        lambda index, due_s: client.complete_one(requests[index], due_s),
        arrivals_s,
        limit_s,
        client.abort,
        after=after,
        until_s=until_s,
    )
    queue_after, is_drafting = client.queue(), "num_drafts" in client.counters()
    results = tuple(_result(row, row.drafts, is_drafting) if row else None for row in sent.results)
    queue_s = None
    if queue_before and queue_after and queue_after[1] > queue_before[1]:
        queue_s = (queue_after[0] - queue_before[0]) / (queue_after[1] - queue_before[1])
    return Served(results, sent.wall_s, None, sent.refused, queue_s, sent.peak_delay_s, sent.arrivals_s)


def _result(row: Row, drafts: Mapping[str, Any] | None, is_drafting: bool) -> PromptResult:
    counts, reason = _counts(row.emitted, drafts, is_drafting)
    assert row.first_s is not None
    assert row.last_s is not None
    steps = tuple(row.emitted[1:]) if counts else None
    return PromptResult(
        tuple(row.token_ids),
        row.first_s,
        row.last_s,
        counts,
        str(row.finish_reason),
        step_tokens=steps,
        why_no_counts=reason,
    )


def _counts(
    emitted: Sequence[int], drafts: Mapping[str, Any] | None, is_drafting: bool
) -> tuple[AcceptanceCounts | None, str | None]:
    """Acceptance counters, or why there are none."""
    if is_drafting and drafts is None:
        return None, "this version of vLLM counts drafts of all requests together; use --batch-sizes 1"
    try:
        return acceptance(emitted, drafts), None
    except EngineError:
        return None, "several steps arrived together"
