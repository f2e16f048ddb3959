"""How to request token ids from each kind of server, and how to read its reply.

A dialect sends every sampling parameter, because servers fill in what is missing from the model's own generation
configuration. The formats are those of the servers' sources: vLLM 0.32 (`entrypoints/openai/completion/protocol.py`),
llama.cpp (`tools/server/server-task.cpp`), SGLang (`/generate`), TensorRT-LLM (`serve/openai_protocol.py`) and
transformers 5 (`cli/serving/completion.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from specdec.sampling_params import SamplingParams
from specdec.servers.errors import EngineError
from specdec.servers.replies import integer, items, mapping, shown

TOKEN_ID = "token_id:"  # how vLLM writes the ids of log-probabilities (return_tokens_as_token_ids)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt for a server. text: what `prompt` is encoded from. stop_token_ids: end of sequence included."""

    model: str
    prompt: Sequence[int]
    text: str
    seed: int
    max_tokens: int
    sampling: SamplingParams
    stop_token_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server replied. None: not reported.

    token_ids: of the completion. finish_reason: "stop" or "length". stop_token: the token that ended the completion.
    logprobs: of its tokens, if the sampling parameters ask for them.
    num_tokens, num_prompt_tokens: the server's own counts. num_drafted, num_accepted: draft tokens of this completion.
    """

    token_ids: tuple[int, ...] | None
    text: str | None
    finish_reason: str
    num_tokens: int | None = None
    num_prompt_tokens: int | None = None
    num_drafted: int | None = None
    num_accepted: int | None = None
    stop_token: int | None = None
    logprobs: tuple[float, ...] | None = None


class Dialect(Protocol):
    """The format of one kind of server. takes_token_ids: whether prompts may be token ids."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def takes_token_ids(self) -> bool: ...

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request. fields: merged into it, such as those that switch speculation off."""
        ...

    def reply(self, answer: Mapping[str, Any]) -> Reply:
        """The reply in an answer. Raises EngineError for one of another format."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAI:
    """Any OpenAI-compatible server of completions: text in both directions, and token ids if the reply has them."""

    name: str = "openai"
    path: str = "/v1/completions"
    takes_token_ids: bool = False

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        return merged(_openai(question) | {"prompt": question.text}, fields)

    def reply(self, answer: Mapping[str, Any]) -> Reply:
        return _openai_reply(answer)


@dataclass(frozen=True, slots=True)
class Vllm(OpenAI):
    """vLLM's server of completions."""

    name: str = "vllm"
    takes_token_ids: bool = True

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        own = _openai(question) | _truncation(question.sampling) | {"top_k": question.sampling.top_k or -1}
        asked = {"return_token_ids": True, "skip_special_tokens": False, "spaces_between_special_tokens": False}
        return merged(own | asked | {"prompt": list(question.prompt)}, fields)


@dataclass(frozen=True, slots=True)
class TensorRT(OpenAI):
    """TensorRT-LLM's server of completions, which refuses fields that it does not know."""

    name: str = "tensorrt-llm"
    takes_token_ids: bool = True

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        own = _openai(question) | _truncation(question.sampling) | {"top_k": question.sampling.top_k}
        # it returns token ids in place of the text
        return merged(own | {"detokenize": False, "prompt": list(question.prompt)}, fields)

    def reply(self, answer: Mapping[str, Any]) -> Reply:
        found = _openai_reply(answer)
        return replace(found, text=found.text or None)


@dataclass(frozen=True, slots=True)
class SGLang:
    """SGLang's native endpoint. Its seeds take effect with --enable-deterministic-inference."""

    name: str = "sglang"
    path: str = "/generate"
    takes_token_ids: bool = True

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        sampling = question.sampling
        parameters = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "max_new_tokens": question.max_tokens,
            "sampling_seed": question.seed,
            "stop_token_ids": list(question.stop_token_ids),
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        body = {"input_ids": list(question.prompt), "sampling_params": parameters}
        return merged(body | ({"return_logprob": True} if sampling.logprobs else {}), fields)

    def reply(self, answer: Mapping[str, Any]) -> Reply:
        _check_error(answer)
        meta = mapping(answer.get("meta_info"), "meta_info")
        end = mapping(meta.get("finish_reason"), "finish_reason")
        return Reply(
            token_ids=_ids(answer, "output_ids", answer.get("text")),
            text=_text(answer.get("text")),
            finish_reason=_ended(end.get("type")),
            num_tokens=_optional(meta, "completion_tokens"),
            num_prompt_tokens=_optional(meta, "prompt_tokens"),
            num_drafted=_optional(meta, "spec_num_proposed_drafts", "spec_draft_token_num"),
            num_accepted=_optional(meta, "spec_num_correct_drafts", "spec_accept_token_num"),
            stop_token=end["matched"] if type(end.get("matched")) is int else None,
            logprobs=_logprobs(_firsts(_listed(meta, "output_token_logprobs"))),
        )


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """llama.cpp's native endpoint."""

    name: str = "llama-server"
    path: str = "/completion"
    takes_token_ids: bool = True

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        sampling = question.sampling
        own = {
            "prompt": list(question.prompt),
            "n_predict": question.max_tokens,
            "seed": question.seed,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            # its default order truncates before the temperature is applied, the reference's after; penalties and the
            # other samplers of its default chain are left out
            "samplers": ["temperature", "top_k", "top_p", "min_p"],
            "return_tokens": True,
        }
        return merged(own | ({"n_probs": 1} if sampling.logprobs else {}), fields)

    def reply(self, answer: Mapping[str, Any]) -> Reply:
        _check_error(answer)
        if answer.get("truncated"):
            raise EngineError("the server must keep the whole prompt, but truncated it; raise its context size")
        timings, stop = mapping(answer.get("timings", {}), "timings"), str(answer.get("stop_type"))
        return Reply(
            token_ids=_ids(answer, "tokens", answer.get("content")),
            text=_text(answer.get("content")),
            finish_reason=_ended({"eos": "stop", "limit": "length"}.get(stop, stop)),
            num_tokens=_optional(answer, "tokens_predicted"),
            num_prompt_tokens=_optional(answer, "tokens_evaluated"),
            num_drafted=integer(timings.get("draft_n", 0), "draft_n"),  # left out if nothing was drafted
            num_accepted=integer(timings.get("draft_n_accepted", 0), "draft_n_accepted"),
            logprobs=_logprobs(_listed(answer, "completion_probabilities"), "logprob"),
        )


@dataclass(frozen=True, slots=True)
class Transformers(OpenAI):
    """`transformers serve`: text in both directions; speculation is a setting of each request's generation config."""

    name: str = "transformers"

    def request(self, question: Question, fields: Mapping[str, Any]) -> dict[str, Any]:
        sampling = question.sampling
        config: dict[str, Any] = {
            "do_sample": sampling.temperature > 0,
            "top_k": sampling.top_k,
            "max_new_tokens": question.max_tokens,
            "eos_token_id": list(question.stop_token_ids),
        }
        own = _openai(question) | {"prompt": question.text, "generation_config": config}
        body = merged(own, fields)
        return body | {"generation_config": json.dumps(body["generation_config"])}  # it takes a string


DIALECTS: dict[str, Dialect] = {
    each.name: each for each in (OpenAI(), Vllm(), LlamaServer(), SGLang(), TensorRT(), Transformers())
}
OWNERS = {"vllm": "vllm", "llamacpp": "llama-server", "sglang": "sglang", "tensorrt_llm": "tensorrt-llm"}


def dialect_of(owned_by: str) -> Dialect:
    """The dialect of a server by the field `owned_by` of its models; plain OpenAI if it is unknown."""
    return DIALECTS[OWNERS.get(owned_by, "openai")]


def merged(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request with further fields; objects are merged, everything else is replaced."""
    result = dict(body)
    for name, value in fields.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _openai(question: Question) -> dict[str, Any]:
    sampling = question.sampling
    own = {
        "model": question.model,
        "max_tokens": question.max_tokens,
        "seed": question.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    return own | ({"logprobs": 1} if sampling.logprobs else {})


def _truncation(sampling: SamplingParams) -> dict[str, Any]:
    """Fields with which vLLM and TensorRT-LLM extend OpenAI's; the model's own configuration must not fill them in."""
    return {"min_p": sampling.min_p, "repetition_penalty": 1.0, "stop_token_ids": list(sampling.stop_token_ids)}


def _openai_reply(answer: Mapping[str, Any]) -> Reply:
    _check_error(answer)
    choices = items(answer, "choices")
    choice = mapping(choices[0] if choices else None, "choices")
    usage = mapping(answer.get("usage") or {}, "usage")
    metrics = mapping(answer.get("metrics") or {}, "metrics")
    drafts = mapping(metrics.get("speculative_decoding") or {}, "speculative_decoding")
    stop, token_ids = choice.get("stop_reason"), _ids(choice, "token_ids", choice.get("text"))
    return Reply(
        token_ids=_logprob_ids(choice) if token_ids is None else token_ids,
        text=_text(choice.get("text")),
        finish_reason=_ended(choice.get("finish_reason")),
        num_tokens=_optional(usage, "completion_tokens"),
        num_prompt_tokens=_optional(usage, "prompt_tokens"),
        num_drafted=_optional(drafts, "num_draft_tokens"),
        num_accepted=_optional(drafts, "num_accepted_draft_tokens"),
        stop_token=stop if type(stop) is int else None,
        logprobs=_logprobs(_listed(mapping(choice.get("logprobs") or {}, "logprobs"), "token_logprobs")),
    )


def _logprob_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Token ids from log-probabilities whose tokens are written as ids."""
    tokens = [str(token) for token in items(mapping(choice.get("logprobs") or {}, "logprobs"), "tokens", ())]
    if not tokens or not all(token.startswith(TOKEN_ID) for token in tokens):
        return None
    ids = [token.removeprefix(TOKEN_ID) for token in tokens]
    return tuple(integer(int(each) if each.isdecimal() else each, "tokens") for each in ids)


def _listed(holder: Mapping[str, Any], name: str) -> list[Any] | None:
    """A list of a reply; None if it is not there."""
    return None if holder.get(name) is None else items(holder, name)


def _firsts(rows: Sequence[Any] | None) -> list[Any] | None:
    """The first entry of each row; None where there is none."""
    return None if rows is None else [row[0] if isinstance(row, list) and row else None for row in rows]


def _logprobs(rows: Sequence[Any] | None, key: str | None = None) -> tuple[float, ...] | None:
    """Log-probabilities, checked; None if there are none. key: where each is in its row; None: the rows are numbers."""
    if rows is None:
        return None
    values: list[Any] = [row if key is None else mapping(row, "log-probabilities").get(key) for row in rows]
    if wrong := [value for value in values if type(value) not in (int, float)]:
        raise EngineError(f"log-probability {shown(wrong[0])} must be a number; see the server's log")
    return tuple(map(float, values))


def _ids(holder: Mapping[str, Any], name: str, text: Any) -> tuple[int, ...] | None:
    """Token ids; None if there are none although there is a text: they were not asked for or are not supported."""
    if holder.get(name) is None or (text and not holder[name]):
        return None
    return tuple(integer(token, name) for token in items(holder, name))


def _text(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise EngineError(f"text={shown(value)} must be a string; is this an OpenAI-compatible server?")
    return value


def _optional(holder: Mapping[str, Any], *names: str) -> int | None:
    """The first of these counts that is there; later names are those of older versions. None if none is."""
    return next((integer(holder[name], name) for name in names if holder.get(name) is not None), None)


def _ended(reason: Any) -> str:
    if reason not in ("stop", "length"):
        raise EngineError(f"finish_reason={shown(reason)} must be stop or length; see the server's log")
    return str(reason)


def _check_error(answer: Mapping[str, Any]) -> None:
    if answer.get("error"):
        raise EngineError(f"the server must continue the prompt, but answered: {shown(answer['error'])}")
