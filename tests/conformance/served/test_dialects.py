"""The formats of servers: requests, and replies as the servers of their sources send them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from specdec import SamplingParams
from specdec.conformance.served.dialects import DIALECTS, Question, dialect_of, merged
from specdec.servers.errors import EngineError
from specdec.servers.metrics import DraftCounter, DraftCounts, draft_counts

SAMPLING = SamplingParams(temperature=0.7, top_p=0.9, stop_token_ids=(9,))
QUESTION = Question("model", (1, 2, 3), "text", 5, 8, SAMPLING, (2, 9))
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def request(name: str, fields: Any = None) -> dict[str, Any]:
    return DIALECTS[name].request(QUESTION, fields or {})


def reply(name: str, answer: Any) -> Any:
    return DIALECTS[name].reply(answer)


@pytest.mark.parametrize("name", DIALECTS)
def test_every_request_has_the_seed_the_limit_and_the_sampling_parameters(name: str) -> None:
    body = json.dumps(request(name))
    assert all(f"{value}" in body for value in (5, 8, 0.7, 0.9))
    assert ("[1, 2, 3]" in body) == DIALECTS[name].takes_token_ids
    assert ('"text"' in body) != DIALECTS[name].takes_token_ids


@pytest.mark.parametrize("name", DIALECTS)
def test_fields_are_merged_into_every_request(name: str) -> None:
    assert request(name, {"speculate": False})["speculate"] is False
    assert request(name, {"seed": 6})["seed"] == 6


def test_objects_are_merged_and_the_rest_is_replaced() -> None:
    assert merged({"a": {"b": 1, "c": 2}, "d": [1]}, {"a": {"c": 3}, "d": [2]}) == {"a": {"b": 1, "c": 3}, "d": [2]}


def test_servers_that_fill_in_defaults_get_none_to_fill_in() -> None:
    for name in ("vllm", "tensorrt-llm"):
        assert (request(name)["min_p"], request(name)["repetition_penalty"]) == (0.0, 1.0)
    assert (request("vllm")["top_k"], request("sglang")["sampling_params"]["top_k"]) == (-1, -1)
    assert request("llama-server")["samplers"] == ["temperature", "top_k", "top_p", "min_p"]
    assert request("llama-server")["min_p"] == 0.0  # its own default is not
    config = json.loads(request("transformers")["generation_config"])
    assert config == {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "eos_token_id": [2, 9]}


def test_tensorrt_gets_no_field_that_it_would_refuse() -> None:
    """Its models forbid unknown fields; these are those of its CompletionRequest."""
    known = {"model", "prompt", "max_tokens", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
    assert set(request("tensorrt-llm")) <= known | {"stop_token_ids", "detokenize"}


def test_transformers_is_switched_per_request_in_its_generation_config() -> None:
    body = request("transformers", {"generation_config": {"prompt_lookup_num_tokens": 4}})
    assert json.loads(body["generation_config"])["prompt_lookup_num_tokens"] == 4
    assert json.loads(body["generation_config"])["do_sample"] is True


def test_vllm() -> None:
    drafts = {"num_draft_tokens": 4, "num_accepted_draft_tokens": 1, "acceptance_histogram": [1, 1]}
    choice = {"index": 0, "text": "ab", "token_ids": [5, 6], "finish_reason": "stop", "stop_reason": 9}
    answer = {"choices": [choice], "usage": USAGE, "metrics": {"speculative_decoding": drafts}}
    found = reply("vllm", answer)
    assert (found.token_ids, found.text, found.finish_reason, found.stop_token) == ((5, 6), "ab", "stop", 9)
    assert (found.num_tokens, found.num_prompt_tokens, found.num_drafted, found.num_accepted) == (2, 3, 4, 1)
    assert reply("vllm", answer | {"metrics": None}).num_drafted is None


def test_ids_in_place_of_the_tokens_of_log_probabilities() -> None:
    """vLLM's return_tokens_as_token_ids."""
    choice = {"text": "ab", "finish_reason": "length", "logprobs": {"tokens": ["token_id:5", "token_id:6"]}}
    assert reply("openai", {"choices": [choice]}).token_ids == (5, 6)
    assert reply("openai", {"choices": [choice | {"logprobs": {"tokens": ["a", "b"]}}]}).token_ids is None
    with pytest.raises(EngineError, match="tokens='x' must be integers"):
        reply("openai", {"choices": [choice | {"logprobs": {"tokens": ["token_id:x"]}}]})


@pytest.mark.parametrize(
    "drafts",
    [
        {"spec_num_proposed_drafts": 6, "spec_num_correct_drafts": 2},
        {"spec_draft_token_num": 6, "spec_accept_token_num": 2},
    ],
)
def test_sglang(drafts: dict[str, int]) -> None:
    meta = {"finish_reason": {"type": "stop", "matched": 2}, "prompt_tokens": 3, "completion_tokens": 2}
    found = reply("sglang", {"text": "ab", "output_ids": [5, 2], "meta_info": meta | drafts | {"spec_verify_ct": 2}})
    assert (found.token_ids, found.stop_token, found.num_tokens) == ((5, 2), 2, 2)
    assert (found.num_drafted, found.num_accepted, found.num_prompt_tokens) == (6, 2, 3)
    plain = reply("sglang", {"text": "ab", "output_ids": [5, 2], "meta_info": meta})
    assert plain.num_drafted is None


def test_tensorrt() -> None:
    choice = {"index": 0, "text": "", "token_ids": [5, 6], "finish_reason": "length", "stop_reason": None}
    found = reply("tensorrt-llm", {"choices": [choice | {"avg_decoded_tokens_per_iter": 2.0}], "usage": USAGE})
    assert (found.token_ids, found.text, found.num_prompt_tokens) == ((5, 6), None, 3)


def test_llama_server() -> None:
    answer = {
        "content": "ab",
        "tokens": [5, 6],
        "stop_type": "limit",
        "truncated": False,
        "tokens_predicted": 2,
        "tokens_evaluated": 3,
        "timings": {"predicted_n": 2, "draft_n": 7, "draft_n_accepted": 1},
    }
    found = reply("llama-server", answer)
    assert (found.token_ids, found.finish_reason, found.num_drafted, found.num_accepted) == ((5, 6), "length", 7, 1)
    assert reply("llama-server", answer | {"timings": {}}).num_drafted == 0  # it leaves them out
    assert reply("llama-server", answer | {"stop_type": "eos"}).finish_reason == "stop"
    with pytest.raises(EngineError, match="must keep the whole prompt"):
        reply("llama-server", answer | {"truncated": True})
    with pytest.raises(EngineError, match="finish_reason='word' must be stop or length"):
        reply("llama-server", answer | {"stop_type": "word"})


def test_the_kind_of_a_server_is_what_owns_its_models() -> None:
    owners = ("vllm", "llamacpp", "sglang", "tensorrt_llm", "", "somebody")
    names = ["vllm", "llama-server", "sglang", "tensorrt-llm", "openai", "openai"]
    assert [dialect_of(owner).name for owner in owners] == names


@pytest.mark.parametrize("prefix", ["vllm", "llamacpp"])
def test_draft_counters_of_a_metrics_page(prefix: str) -> None:
    page = (
        f"# HELP {prefix}:spec_decode_num_draft_tokens_total Drafted.\n"
        f'{prefix}:spec_decode_num_draft_tokens_total{{engine="0"}} 40\n'
        f'{prefix}:spec_decode_num_draft_tokens_total{{engine="1"}} 2\n'
        f"{prefix}:spec_decode_num_accepted_tokens_total 8.0\n"
    )
    found = draft_counts(page)
    assert found is not None
    assert (found.num_finished, found.num_drafted, found.num_accepted) == (None, 42, 8)
    assert draft_counts("vllm:request_success_total 3\n") is None


TENSORRT_METRICS = """[
    {
        "gpuMemUsage": 76665782272,
        "iter": 154,
        "iterLatencyMS": 7.00688362121582,
        "kvCacheStats": {"cacheHitRate": 0.00128, "missedBlocks": 3121, "reusedBlocks": 4, "tokensPerBlock": 32},
        "numActiveRequests": 1
    },
    {
        "iter": 155,
        "specDecodingStats": {
            "acceptanceLength": 2.5,
            "draftOverhead": 0.1,
            "iterLatencyMS": 0.7,
            "numAcceptedTokens": 3,
            "numDraftTokens": 8,
            "numRequestsWithDraftTokens": 2
        }
    },
    {"iter": 156, "specDecodingStats": {"numAcceptedTokens": 1, "numDraftTokens": 4}}
]"""


def test_iterations_of_tensorrt_are_added_up_as_it_forgets_them() -> None:
    """In the format of its documentation, with the fields of its SpecDecodingStats."""
    counter = DraftCounter()
    assert counter.read("[]") == DraftCounts(None, 0, 0)
    assert counter.read(TENSORRT_METRICS) == DraftCounts(None, 12, 4)
    assert counter.read("[]") == DraftCounts(None, 12, 4)
    assert counter.read(TENSORRT_METRICS) == DraftCounts(None, 24, 8)


def test_a_counter_reads_sums_as_they_are() -> None:
    page = "vllm:spec_decode_num_draft_tokens_total 4\nvllm:spec_decode_num_accepted_tokens_total 2\n"
    counter = DraftCounter()
    assert [counter.read(page), counter.read(page)] == [DraftCounts(None, 4, 2)] * 2
    assert counter.read("vllm:request_success_total 3\n") is None


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("[", "/metrics must be JSON"),
        ("[3]", "iteration=3 must be an object"),
        ('[{"specDecodingStats": 3}]', "specDecodingStats=3 must be an object"),
        ('[{"specDecodingStats": {"numDraftTokens": -1}}]', "numDraftTokens=-1 must be integers from 0"),
    ],
)
def test_iterations_of_another_shape_are_errors(page: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        DraftCounter().read(page)


LOGPROBS = {
    "vllm": {"choices": [{"text": "ab", "finish_reason": "length", "logprobs": {"token_logprobs": [-0.5, -2]}}]},
    "sglang": {
        "text": "ab",
        "output_ids": [5, 6],
        "meta_info": {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, 5, None], [-2, 6, None]]},
    },
    "llama-server": {
        "content": "ab",
        "tokens": [5, 6],
        "stop_type": "limit",
        "completion_probabilities": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2}],
    },
}


@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probabilities_are_requested_and_read(name: str) -> None:
    asked = {"vllm": "logprobs", "sglang": "return_logprob", "llama-server": "n_probs"}[name]
    question = replace(QUESTION, sampling=SamplingParams(logprobs=True))
    assert asked not in request(name)
    assert DIALECTS[name].request(question, {})[asked] == 1
    assert reply(name, LOGPROBS[name]).logprobs == (-0.5, -2.0)


@pytest.mark.parametrize("row", [{"token": "a"}, {"logprob": None}, 3])
def test_log_probabilities_must_be_numbers(row: Any) -> None:
    with pytest.raises(EngineError, match=r"log-probabilit(y|ies).* must be (a number|an object)"):
        reply("llama-server", LOGPROBS["llama-server"] | {"completion_probabilities": [row]})
