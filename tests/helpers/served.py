"""Served models on the loopback interface: real engines in the formats of servers, and servers that go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Lock
from typing import Any

import torch

from helpers.loopback import loopback
from specdec import Engine, SamplingParams

Change = Callable[[dict[str, Any], dict[str, Any], int], Any]
ENGINES = Lock()  # one at a time: an earlier test's server may still be decoding for a client that has gone


class Hangup(Exception):
    """The server closes the connection without an answer."""


@dataclass
class Model:
    """An engine behind vLLM's format. change: (reply, request, number of the request) -> the reply that is sent; a
    number is sent as an HTTP status. counts: what its metrics page reports."""

    engine: Engine
    change: Change = lambda reply, request, number: reply
    requests: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("finished", "drafted", "accepted"), 0))

    def get(self, path: str) -> tuple[int, str]:
        pages = {
            "/v1/models": json.dumps({"data": [{"id": "tiny", "owned_by": "vllm"}]}),
            "/version": json.dumps({"version": "0.0"}),
            "/metrics": (
                f'vllm:request_success_total{{a="b"}} {self.counts["finished"]}\n'
                f"vllm:spec_decode_num_draft_tokens_total {self.counts['drafted']}\n"
                f"vllm:spec_decode_num_accepted_tokens_total {self.counts['accepted']}\n"
            ),
        }
        return (200, pages[path]) if path in pages else (404, "no such page")

    def post(self, request: dict[str, Any]) -> tuple[int, str]:
        with ENGINES:
            self.requests.append(request)
            number = len(self.requests)
            reply = self.change(self.reply(request), request, number)
        return (reply, "no") if isinstance(reply, int) else (200, json.dumps(reply))

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        names = ("seed", "temperature", "top_p", "max_tokens")
        given = {name: request[name] for name in names if name in request}
        sampling = SamplingParams(**given, top_k=max(0, request.get("top_k", 0)))
        prompt = request["prompt"]
        tokens = self.engine.target.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        (done,) = self.engine.generate([tokens], [sampling])
        self.counts["finished"] += 1
        self.counts["drafted"] += done.counts.num_drafted
        self.counts["accepted"] += done.counts.num_accepted
        text = self.engine.target.tokenizer.decode(done.token_ids, skip_special_tokens=False)
        choice = {"text": text, "token_ids": list(done.token_ids), "finish_reason": done.finish_reason}
        if "logprobs" in request:
            choice["logprobs"] = {"token_logprobs": self.logprobs(tokens, list(done.token_ids))}
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(done.token_ids)}
        if "prompt_logprobs" in request:
            choice["prompt_logprobs"] = self.prompt_logprobs(tokens, request["prompt_logprobs"])
        return {"choices": [choice], "usage": usage}

    def logprobs(self, prompt: list[int], output: list[int]) -> list[float]:
        """Of the output's tokens, by the model at temperature 1."""
        logits = self.engine.target.model(torch.tensor([prompt + output]), use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return [float(row[token]) for row, token in zip(rows, output, strict=True)]

    def prompt_logprobs(self, tokens: list[int], number: int) -> list[Any]:
        """As vLLM reports them: the most likely tokens at each position of a prompt, and the prompt's own token."""
        logits = self.engine.target.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        rows: list[Any] = [None]
        for log_probs, token in zip(logits, tokens[1:], strict=False):
            chosen = {*log_probs.topk(number).indices.tolist(), token}
            rows.append({str(each): {"logprob": float(log_probs[each]), "rank": 1} for each in chosen})
        return rows


@contextmanager
def serving(model: Any) -> Iterator[str]:
    """The URL of a server that answers as model.get(path) and model.post(request)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*model.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.answer(*model.post(body))
            except (Hangup, OSError):
                self.close_connection = True

        def answer(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    with loopback(Handler, daemon_threads=True) as server:
        yield server.url


# -- what goes wrong: changes of a reply -----------------------------------------------------------------------


def of_choice(change: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]], after: int = 0) -> Change:
    """A change of the only choice of each reply after the first ones."""

    def changed(reply: dict[str, Any], request: dict[str, Any], number: int) -> Any:
        return reply if number <= after else reply | {"choices": [change(reply["choices"][0], request)]}

    return changed


def dies(reply: dict[str, Any], request: dict[str, Any], number: int) -> Any:
    if number > 10:
        raise Hangup
    return reply


def hesitates(reply: dict[str, Any], request: dict[str, Any], number: int) -> Any:
    if number > 10:
        time.sleep(2)
    return reply


def refuses_seeds(reply: dict[str, Any], request: dict[str, Any], number: int) -> Any:
    return 400 if "seed" in request else reply


@dataclass
class Cache:
    """Replies with the first reply to each prompt for ever: a proxy that leaves the seed out of its key."""

    replies: dict[str, Any] = field(default_factory=dict)

    def __call__(self, reply: dict[str, Any], request: dict[str, Any], number: int) -> Any:
        return self.replies.setdefault(str(request["prompt"]), reply)
