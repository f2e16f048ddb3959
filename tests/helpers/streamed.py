"""Real engines that stream in the formats of SGLang, TensorRT-LLM and OpenAI's completions, and ways to go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from typing import Any

from helpers.loopback import loopback
from specdec import Engine, SamplingParams

Json = dict[str, Any]
ENGINES = Lock()  # one at a time: an earlier test's server may still be decoding for a client that has gone


@dataclass
class StreamedModel:
    """An engine behind one of the formats.

    joined: steps that are sent as one event. incremental: SGLang's --incremental-streaming-output. hides_stop: whether
    the token that ended an output is left out. pages: replace or add pages. fault: (handler, events) sends them.
    """

    kind: str
    engine: Engine
    gamma: int = 0
    joined: int = 1
    incremental: bool = False
    hides_stop: bool = False
    pages: Json = field(default_factory=dict)
    fault: Callable[[Any, list[str]], None] | None = None
    requests: list[Json] = field(default_factory=list)
    finished: list[Json] = field(default_factory=list)  # what /perf_metrics has not sent yet
    counts: list[Any] = field(default_factory=list)  # the engine's own, of each request

    def page(self, path: str) -> str | None:
        algorithm = {"speculative_algorithm": "STANDALONE", "speculative_num_steps": self.gamma}
        info = {"version": "0.5.4", "dtype": "float32", "quantization": None, "speculative_algorithm": None}
        info |= algorithm | {"speculative_num_draft_tokens": self.gamma + 1} if self.gamma else {}
        pages = {"/v1/models": {"data": [{"id": "other"}, {"id": "served", "root": self.engine_name}]}}
        if self.kind == "sglang":
            pages["/get_server_info"] = info
        if self.kind == "tensorrt-llm":
            pages |= {"/version": {"version": "1.2.0"}, "/perf_metrics": self.finished}
        page = (pages | self.pages).get(path)
        text = json.dumps(page) if page is not None else None
        if path == "/perf_metrics":
            self.finished.clear()
        return text

    engine_name: str = "served"

    def events(self, request: Json) -> list[str]:
        self.requests.append(request)
        prompt, sampling = self.asked(request)
        with ENGINES:
            (done,) = self.engine.generate([prompt], [sampling])
        self.counts.append(done.counts)
        tokens, counts = list(done.token_ids), done.counts
        step_tokens = [len(tokens) - counts.num_emitted, *(step.num_emitted for step in done.steps)]
        if self.hides_stop and done.finish_reason == "stop":
            tokens, step_tokens = tokens[:-1], [*step_tokens[:-1], step_tokens[-1] - 1]
        ends = [sum(step_tokens[: end + 1]) for end in range(len(step_tokens))]
        ends = [*ends[self.joined - 1 : -1 : self.joined], ends[-1]]
        made = {"sglang": self.sglang, "tensorrt-llm": self.tensorrt, "openai": self.openai}[self.kind]
        return [json.dumps(event) for event in made(prompt, tokens, ends, done)]

    def asked(self, request: Json) -> tuple[list[int], SamplingParams]:
        if self.kind == "sglang":
            given = request["sampling_params"]
            assert request["stream"]
            names = {"max_new_tokens": "max_tokens", "sampling_seed": "seed", "temperature": "temperature"}
            return request["input_ids"], SamplingParams(**{own: given[name] for name, own in names.items()})
        names = ("max_tokens", "seed", "temperature", "top_p")
        prompt = request["prompt"]
        tokens = self.engine.target.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        return tokens, SamplingParams(**{name: request[name] for name in names})

    def sglang(self, prompt: Sequence[int], tokens: list[int], ends: list[int], done: Any) -> Iterator[Json]:
        before, counts = 0, done.counts
        for end in ends:
            start, is_last = before if self.incremental else 0, end == ends[-1]
            meta: Json = {"prompt_tokens": len(prompt), "completion_tokens": end, "finish_reason": None}
            if is_last:
                meta["finish_reason"] = {"type": done.finish_reason, "matched": done.token_ids[-1]}
            if is_last and self.gamma:
                histogram = counts.acceptance_histogram
                meta |= {"spec_verify_ct": counts.num_steps, "spec_num_proposed_drafts": counts.num_drafted}
                meta |= {"spec_num_correct_drafts": counts.num_accepted, "spec_correct_drafts_histogram": histogram}
                meta |= {"spec_accept_histogram": histogram}
            yield {"text": self.text(tokens[start:end]), "output_ids": tokens[start:end], "meta_info": meta}
            before = end

    def tensorrt(self, prompt: Sequence[int], tokens: list[int], ends: list[int], done: Any) -> Iterator[Json]:
        before, counts = 0, done.counts
        for end in ends:
            is_last = end == ends[-1]
            choice = {"index": 0, "text": "", "token_ids": tokens[before:end], "finish_reason": None}
            if is_last:
                quotient = len(done.token_ids) / (counts.num_steps + 1)
                choice |= {"finish_reason": done.finish_reason, "avg_decoded_tokens_per_iter": quotient}
            yield {"choices": [choice], "usage": None}
            before = end
        drafts = {"total_draft_tokens": counts.num_drafted, "total_accepted_draft_tokens": counts.num_accepted}
        speculative = {"speculative_decoding": drafts} if self.gamma else {}
        self.finished.append({"request_id": len(self.requests), "perf_metrics": {"first_iter": 0, **speculative}})
        yield {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}}

    def openai(self, prompt: Sequence[int], tokens: list[int], ends: list[int], done: Any) -> Iterator[Json]:
        before = 0
        for end in ends:
            yield {"choices": [{"text": self.text(tokens[before:end]), "finish_reason": None}]}
            before = end
        yield {"choices": [{"text": "", "finish_reason": done.finish_reason}]}
        yield {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(done.token_ids)}}

    def text(self, tokens: Sequence[int]) -> str:
        return str(self.engine.target.tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


@contextmanager
def streaming(model: StreamedModel) -> Iterator[str]:
    """The URL of a server that streams what the model replies."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a body ends with the connection

        def do_GET(self) -> None:
            page = model.page(self.path)
            self.begin(404 if page is None else 200)
            self.wfile.write((page or "").encode())

        def do_POST(self) -> None:
            events = model.events(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            try:
                (model.fault or sent)(self, events)
            except OSError:
                self.close_connection = True

        def begin(self, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    with loopback(Handler, daemon_threads=True) as server:
        yield server.url


def sent(handler: Any, events: list[str]) -> None:
    handler.begin()
    for event in events:
        handler.wfile.write(f"data: {event}\n\n".encode())
        handler.wfile.flush()
    handler.wfile.write(b"data: [DONE]\n\n")


# -- ways to go wrong ------------------------------------------------------------------------------------------


def silent(handler: Any, events: list[str]) -> None:
    time.sleep(5)


def slow(handler: Any, events: list[str]) -> None:
    """A byte at a time: never silent, never finished."""
    handler.begin()
    for _ in range(400):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def malformed(handler: Any, events: list[str]) -> None:
    sent(handler, [events[0], "{"])


def dying(handler: Any, events: list[str]) -> None:
    handler.begin()
    handler.wfile.write(f"data: {events[0]}\n\n".encode())


def redirecting(handler: Any, events: list[str]) -> None:
    handler.begin(302, Location="http://192.0.2.1/")


def endless(handler: Any, events: list[str]) -> None:
    """Repeats the first tokens for ever, whatever max_tokens says."""
    sent(handler, [events[0], *events[:-1] * 50])


def of_other_tokens(handler: Any, events: list[str]) -> None:
    """Token ids beyond the vocabulary, or a text that has other tokens than the server counts."""
    changed = [json.loads(event) for event in events]
    for event in changed:
        for choice in event.get("choices", ()):
            choice |= {"token_ids": [10**6 for _ in choice["token_ids"]]} if "token_ids" in choice else {}
            choice["text"] = "t" * len(choice["text"]) if "token_ids" not in choice else ""
        if "output_ids" in event:
            event |= {"output_ids": [10**6 for _ in event["output_ids"]], "text": ""}
        if event.get("usage"):
            event["usage"]["completion_tokens"] += 3
    sent(handler, [json.dumps(event) for event in changed])
