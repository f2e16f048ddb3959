"""The formats in which servers stream a completion, and what each server reports about its drafts.

The events of a stream are joined to the answer that the server would have given without streaming, which
`specdec.conformance.served` reads: requests and replies have one description. The formats are those of the servers'
sources: SGLang (`managers/tokenizer_manager.py`, `entrypoints/http_server.py`), TensorRT-LLM
(`serve/postprocess_handlers.py`, `serve/openai_server.py`) and OpenAI's completions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.engines import counters
from specdec import AcceptanceCounts
from specdec.conformance.served.dialects import Reply
from specdec.runtime.printable import printable
from specdec.servers.errors import EngineError
from specdec.servers.replies import MAX_SHOWN, integer, items, mapping, shown

MAX_DEVIATION = 1e-3  # of a number of tokens that is computed from TensorRT-LLM's quotient


@dataclass(slots=True)
class Progress:
    """When the tokens of a completion arrived.

    max_tokens: of the request. emitted: tokens of each event that had any; 1 where an event has only a text. first_s,
    last_s: time of the first and of the last. has_ended: whether the stream has its finish_reason. ended_alone: whether
    that came without a token.
    """

    max_tokens: int
    emitted: list[int] = field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    has_ended: bool = False
    ended_alone: bool = False

    def add(self, num_tokens: int, now_s: float) -> None:
        """Count the tokens of an event. Raises EngineError if they are too many or come after the end."""
        if num_tokens and self.has_ended:
            raise EngineError("the server must send no tokens after its finish_reason, but did; see its log")
        if num_tokens:
            self.emitted.append(num_tokens)
            self.first_s = now_s if self.first_s is None else self.first_s
            self.last_s = now_s
        if sum(self.emitted) > self.max_tokens:
            raise EngineError(f"the server must stop at max_tokens={self.max_tokens}, but did not; see its log")

    def end(self, num_tokens: int, now_s: float) -> None:
        """Note the end, which may replace a stop token that the server does not send. num_tokens: of that event."""
        self.has_ended, self.ended_alone = True, num_tokens == 0
        self.first_s = now_s if self.first_s is None else self.first_s
        self.last_s = now_s if self.last_s is None else self.last_s


class Stream(Protocol):
    """A completion while it is streamed."""

    @property
    def progress(self) -> Progress: ...

    def take(self, event: Mapping[str, Any], now_s: float) -> None:
        """Add an event. Raises EngineError for one of another format."""
        ...

    def answer(self) -> dict[str, Any]:
        """The whole completion, in the format of an answer that is not streamed."""
        ...


@dataclass(slots=True)
class OpenAIStream:
    """Deltas of a text, or of token ids instead, as OpenAI's completions and TensorRT-LLM send them."""

    progress: Progress
    token_ids: list[Any] | None = None
    texts: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # of the choice that ended the completion
    usage: Any = None

    def take(self, event: Mapping[str, Any], now_s: float) -> None:
        check_error(event)
        self.usage = event.get("usage") or self.usage
        for choice in items(event, "choices", ()):
            self._take_choice(mapping(choice, "choices"), now_s)

    def _take_choice(self, choice: Mapping[str, Any], now_s: float) -> None:
        text, tokens = choice.get("text") or "", choice.get("token_ids")
        if not isinstance(text, str):
            raise EngineError(f"text={shown(text)} must be a string; is this an OpenAI-compatible server?")
        if tokens is not None:
            self.token_ids = [*(self.token_ids or ()), *items(choice, "token_ids")]
        num_tokens = len(tokens) if tokens is not None else int(bool(text))
        self.progress.add(num_tokens, now_s)
        self.texts.append(text)
        if choice.get("finish_reason"):
            self.last = dict(choice)
            self.progress.end(num_tokens, now_s)

    def answer(self) -> dict[str, Any]:
        choice = {**self.last, "text": "".join(self.texts), "token_ids": self.token_ids}
        return {"choices": [choice], "usage": self.usage}


@dataclass(slots=True)
class SGLangStream:
    """Answers of SGLang, each with all tokens until then, or, with incremental_streaming_output, with those since."""

    progress: Progress
    token_ids: list[Any] = field(default_factory=list)
    text: str = ""
    last: dict[str, Any] = field(default_factory=dict)

    def take(self, event: Mapping[str, Any], now_s: float) -> None:
        check_error(event)
        meta, tokens = mapping(event.get("meta_info"), "meta_info"), items(event, "output_ids")
        num_tokens, before = integer(meta.get("completion_tokens"), "completion_tokens"), len(self.token_ids)
        text = event.get("text") or ""
        if not isinstance(text, str):
            raise EngineError(f"text={shown(text)} must be a string; is this an SGLang server?")
        if len(tokens) == num_tokens and tokens[:before] == self.token_ids:
            self.token_ids, self.text = tokens, text
        elif before + len(tokens) == num_tokens:
            self.token_ids, self.text = [*self.token_ids, *tokens], self.text + text
        else:
            raise EngineError(
                f"completion_tokens={num_tokens} must be the number of output_ids, {len(tokens)}, or the sum of these "
                f"and the {before} before; see the server's log"
            )
        self.progress.add(num_tokens - before, now_s)
        self.last = dict(event)
        if meta.get("finish_reason"):
            self.progress.end(num_tokens - before, now_s)

    def answer(self) -> dict[str, Any]:
        return {**self.last, "output_ids": self.token_ids, "text": self.text}


def check_error(event: Mapping[str, Any]) -> None:
    """Raise EngineError for an event that reports one."""
    if event.get("error"):
        raise EngineError(
            f"the server must continue the prompt, but answered: {printable(str(event['error'])[:MAX_SHOWN])}"
        )


# -- counters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion. answer: as without streaming. reply: its content. emitted: tokens of each event.

    num_tokens: with a stop token that the server did not send. depth: levels of the server's drafts if they are trees.
    performance: TensorRT-LLM's measurements of this request; None without any.
    """

    answer: Mapping[str, Any]
    reply: Reply
    emitted: Sequence[int]
    num_tokens: int
    depth: int | None = None
    performance: Mapping[str, Any] | None = None


Counted = tuple[AcceptanceCounts | None, str | None]  # the counters, or why there are none


def sglang_counts(completion: Completion) -> Counted:
    """Counters of a completion: SGLang counts verification steps, and these by their accepted tokens."""
    meta, reply = mapping(completion.answer.get("meta_info"), "meta_info"), completion.reply
    if meta.get("spec_verify_ct") is None or reply.num_drafted is None or reply.num_accepted is None:
        return None, "the reply has no spec_verify_ct and no numbers of draft tokens; this version does not report them"
    num_steps = integer(meta["spec_verify_ct"], "spec_verify_ct")
    names = ("spec_correct_drafts_histogram", "spec_accept_histogram")  # newer versions send both, older ones the last
    counts = next((items(meta, name) for name in names if meta.get(name)), [])
    drafts = {"histogram": [integer(count, names[0]) for count in counts], "num_drafted": reply.num_drafted}
    is_step_by_step = len(completion.emitted) - 1 == num_steps
    if not counts and not is_step_by_step:
        return None, "several steps arrived together, and the reply has no histogram of accepted tokens"
    try:
        if not counts:
            return counters.from_steps(completion.emitted, reply.num_drafted, reply.num_accepted), None
        if is_step_by_step:
            return counters.acceptance(completion.emitted, drafts, completion.depth), None
        return counters.of_steps(completion.num_tokens, num_steps, drafts, completion.depth), None
    except EngineError as error:
        return None, str(error)


def tensorrt_counts(completion: Completion) -> Counted:
    """Counters of a completion: TensorRT-LLM reports tokens per iteration, and draft tokens on /perf_metrics."""
    quotient = tokens_per_iteration(completion.answer)
    if quotient is None:
        return None, "the reply has no avg_decoded_tokens_per_iter, by which steps are distinguished"
    if completion.performance is None:
        return None, (
            "/perf_metrics has no draft tokens of this request alone; start the server with return_perf_metrics: true, "
            "and use --batch-sizes 1"
        )
    num_tokens = quotient * len(completion.emitted)  # with the stop token, or without
    if not completion.num_tokens - 1 - MAX_DEVIATION < num_tokens < completion.num_tokens + MAX_DEVIATION:
        return None, "several steps arrived together, and accepted tokens are not counted by position"
    names = ("total_draft_tokens", "total_accepted_draft_tokens")
    num_drafted, num_accepted = (integer(completion.performance.get(name), name) for name in names)
    try:
        return counters.from_steps(completion.emitted, num_drafted, num_accepted), None
    except EngineError as error:
        return None, str(error)


def tokens_per_iteration(answer: Mapping[str, Any]) -> float | None:
    """TensorRT-LLM's mean number of tokens per iteration, the prefill's included; None if it is not reported."""
    choice = mapping(items(answer, "choices")[0], "choices")
    quotient = choice.get("avg_decoded_tokens_per_iter")
    return float(quotient) if isinstance(quotient, int | float) and 0 < quotient < math.inf else None


def no_counts(completion: Completion) -> Counted:
    """Plain OpenAI endpoints count nothing."""
    return None, "OpenAI's completions report no draft tokens"
