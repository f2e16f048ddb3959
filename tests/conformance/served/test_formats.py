"""Audits of engines behind the native formats of llama-server, SGLang, TensorRT-LLM and transformers serve."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers.served import Model, serving

Json = dict[str, Any]


def llama_request(request: Json) -> Json:
    names = {"prompt": "prompt", "n_predict": "max_tokens", "seed": "seed", "temperature": "temperature"}
    assert request["return_tokens"]
    return {name: request[own] for own, name in names.items()} | {"top_p": request["top_p"]}


def llama_reply(reply: Json, drafts: tuple[int, int]) -> Json:
    choice, usage = reply["choices"][0], reply["usage"]
    return {
        "content": choice["text"].removesuffix("</s>"),
        "tokens": choice["token_ids"],
        "stop_type": {"stop": "eos", "length": "limit"}[choice["finish_reason"]],
        "truncated": False,
        "tokens_predicted": usage["completion_tokens"],
        "tokens_evaluated": usage["prompt_tokens"],
        "timings": {"draft_n": drafts[0], "draft_n_accepted": drafts[1]} if drafts[0] else {},
    }


def sglang_request(request: Json) -> Json:
    sampling = request["sampling_params"]
    names = {"max_tokens": "max_new_tokens", "seed": "sampling_seed", "temperature": "temperature", "top_p": "top_p"}
    return {"prompt": request["input_ids"]} | {name: sampling[own] for name, own in names.items()}


def sglang_reply(reply: Json, drafts: tuple[int, int]) -> Json:
    choice, usage = reply["choices"][0], reply["usage"]
    end = {"type": choice["finish_reason"], "matched": choice["token_ids"][-1]}
    counts = {"spec_num_proposed_drafts": drafts[0], "spec_num_correct_drafts": drafts[1]}
    return {
        "text": choice["text"],
        "output_ids": choice["token_ids"],
        "meta_info": {**usage, "finish_reason": end, **(counts if drafts[0] else {})},
    }


def tensorrt_reply(reply: Json, drafts: tuple[int, int]) -> Json:
    """The ids in place of the text, without the token that ended it."""
    choice = reply["choices"][0]
    tokens = choice["token_ids"][: -1 if choice["finish_reason"] == "stop" else None]
    return {"choices": [choice | {"text": "", "token_ids": tokens}], "usage": {"prompt_tokens": 1}} | {
        "usage": {"prompt_tokens": reply["usage"]["prompt_tokens"]}
    }


def tensorrt_metrics(drafts: tuple[int, int]) -> str:
    """Its iterations since the page was last read, without most of their fields."""
    iteration = {"gpuMemUsage": 76665782272, "iter": 154, "iterLatencyMS": 7.0, "numActiveRequests": 1}
    stats = {"numDraftTokens": drafts[0], "numAcceptedTokens": drafts[1], "acceptanceLength": 1.5}
    return json.dumps([iteration, iteration | {"specDecodingStats": stats}] if any(drafts) else [iteration])


def transformers_request(request: Json) -> Json:
    config = json.loads(request["generation_config"])
    assert config["do_sample"]
    assert isinstance(request["prompt"], str)
    return request


def transformers_reply(reply: Json, drafts: tuple[int, int]) -> Json:
    """The text alone, without special tokens."""
    choice = reply["choices"][0]
    kept = {"text": choice["text"].removesuffix("</s>"), "finish_reason": choice["finish_reason"]}
    return reply | {"choices": [kept]}


FORMATS: dict[str, tuple[str, Callable[[Json], Json], Callable[[Json, tuple[int, int]], Json]]] = {
    "llama-server": ("llamacpp", llama_request, llama_reply),
    "sglang": ("sglang", sglang_request, sglang_reply),
    "tensorrt-llm": ("tensorrt_llm", lambda request: request, tensorrt_reply),
    "transformers": ("someone", transformers_request, transformers_reply),
}


class Formatted(Model):
    """An engine in the format of one of these servers."""

    kind = ""
    counts_iterations = False
    reported = (0, 0)

    def get(self, path: str) -> tuple[int, str]:
        if path == "/metrics" and self.counts_iterations:
            counts = self.counts["drafted"], self.counts["accepted"]
            new = counts[0] - self.reported[0], counts[1] - self.reported[1]
            self.reported = counts
            return 200, tensorrt_metrics(new)
        pages = {
            "/v1/models": json.dumps({"data": [{"id": "tiny", "owned_by": FORMATS[self.kind][0]}]}),
            "/props": json.dumps({"build_info": "b1-abc"}),
        }
        return (200, pages[path]) if path in pages else (404, "")

    def reply(self, request: Json) -> Json:
        _, asked, replied = FORMATS[self.kind]
        before = dict(self.counts)
        reply = super().reply(asked(request))
        return replied(reply, tuple(self.counts[name] - before[name] for name in ("drafted", "accepted")))


def run(kind: str, engines: Any, audit: Any, *options: str) -> tuple[int, Json]:
    models = {name: Formatted(engine) for name, engine in engines.items()}
    for model in models.values():
        model.kind = kind
    with serving(models["speculative"]) as url, serving(models["plain"]) as plain_url:
        result: tuple[int, Json] = audit(url, "--control-url", plain_url, *options)
    return result


OPTIONS = ("--num-draws", "420", "--max-tv", "0.3", "--max-tokens", "24")


@pytest.mark.parametrize("kind", ["llama-server", "sglang"])
def test_ids_and_drafts_of_each_reply_certify_an_engine(kind: str, engines: Any, audit: Any) -> None:
    status, record = run(kind, engines, audit, *OPTIONS)
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert record["engine"] == kind  # by what the server says of itself
    assert 0 < record["num_accepted"] <= record["num_drafted"]
    assert record["engine_version"] == "b1-abc"


def test_a_server_that_counts_no_drafts_gets_no_verdict(engines: Any, audit: Any) -> None:
    status, record = run("tensorrt-llm", engines, audit, *OPTIONS)
    assert (status, record["engine"], record["num_drafted"]) == (3, "tensorrt-llm", None)
    assert record["reasons"][0].startswith("speculation not confirmed")
    assert record["p_value"] > 1e-6  # its tokens are right


def test_iterations_that_a_server_forgets_are_added_up(
    engines: Any, audit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Formatted, "counts_iterations", True)
    status, record = run("tensorrt-llm", engines, audit, *OPTIONS)
    assert (status, record["verdict"]) == (0, "lossless"), record["reasons"]
    assert 0 < record["num_accepted"] <= record["num_drafted"]


def test_texts_that_are_written_in_two_ways_leave_the_tokens_uncertain(engines: Any, audit: Any) -> None:
    """A random model draws such tokens all the time; how a trained one fares is for its own audit to say."""
    status, record = run("transformers", engines, audit, *OPTIONS, "--server", "transformers")
    assert (status, record["engine"]) == (3, "transformers")
    assert "uncertain" in record["reasons"][0]
