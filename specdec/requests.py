"""Requests, their state in the decode loop, and their completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, Literal

from torch import Tensor

from specdec.constraints.progress import Constraint, Progress
from specdec.runtime.recording import Recorder
from specdec.sampling.state import SamplingState
from specdec.sampling_params import SamplingParams
from specdec.stats import AcceptanceCounts
from specdec.texts import GrowingText

TokenSource = Literal["accepted", "recovered", "bonus", "plain"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue.

    index: the prompt's number. prompt: token ids, at least one. sampling: its parameters.
    stop_token_ids: all tokens that end it, including the model's end-of-sequence tokens unless they are ignored.
    arrival_s: arrival time in seconds after the start of the run. after: index of the request that it follows, as the
    next turn of a conversation does; arrival_s then counts from that one's last token.
    constraint: the output constraint compiled from `sampling`, or None. sample: its number among the `sampling.n`
    samples of the prompt, which share the index.
    new_text: creates an incremental detokenizer, which stop strings need; None without a tokenizer.
    """

    index: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int] = frozenset()
    arrival_s: float = 0.0
    constraint: Constraint | None = None
    sample: int = 0
    new_text: Callable[[], GrowingText] | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step of one request, after truncation.

    num_drafted: tokens proposed. num_accepted: proposed tokens emitted.
    last: source of the token after them, "bonus" for an empty draft; None if truncation removed it.
    depth: for a tree, its number of levels, which is the maximum accepted length; None for a chain.
    """

    num_drafted: int
    num_accepted: int
    last: TokenSource | None
    depth: int | None = None

    @property
    def num_emitted(self) -> int:
        """Tokens emitted."""
        return self.num_accepted + (self.last is not None)


def sources_of(steps: Sequence[Step]) -> tuple[TokenSource, ...]:
    """The source of each token emitted by some decode steps; "plain" for a step without a draft."""
    sources: list[TokenSource] = []
    for step in steps:
        sources += ["accepted"] * step.num_accepted
        if step.last is not None:
            sources.append(step.last if step.num_drafted else "plain")
    return tuple(sources)


@dataclass(slots=True, eq=False)
class Generation:
    """A request in flight. tokens: its prompt and the emitted tokens. Times are clock readings in seconds.

    admitted_s: when it got a slot. progress: state of the request's constraint after the emitted tokens.
    text: of the emitted tokens, updated on demand; truncated at `text_end` unless that is None.
    stop_reason: the stop token or stop string that ended it.
    """

    request: Request
    arrival_s: float
    tokens: list[int] = field(init=False)
    progress: Progress | None = field(init=False)
    steps: list[Step] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    text: GrowingText | None = field(init=False)
    text_end: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)
        self.text = self.request.new_text() if self.request.new_text else None
        self.progress = Progress(self.request.constraint) if self.request.constraint else None

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be emitted."""
        return len(self.request.prompt) + self.request.sampling.max_tokens - len(self.tokens)

    @property
    def output(self) -> list[int]:
        """The emitted tokens."""
        return self.tokens[len(self.request.prompt) :]

    def emit(self, tokens: Sequence[int]) -> int:
        """Append tokens up to the first stop token, the end of a stop string, or `max_tokens`.

        Returns the number of tokens appended.
        """
        for kept, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if token in self.request.stop_token_ids:
                self.finish_reason, self.stop_reason = "stop", token
            elif self.request.sampling.stop and self._completes_stop_string(token):
                self.finish_reason = "stop"
            elif self.num_remaining == 0:
                self.finish_reason = "length"
            if self.finish_reason:
                return kept
        return len(tokens)

    def visible_text(self) -> str | None:
        """The final part of the output text, without a possible start of a stop string; None without tokenizer."""
        if self.text is None:
            return None
        self.text.follow(self.output)
        if self.finish_reason and self.text_end is None:
            self.text.finish()
        whole, stop = self.text.text[: self.text_end], self.request.sampling.stop
        if self.finish_reason or not stop or self.request.sampling.include_stop_str_in_output:
            return whole
        return whole[: len(whole) - _partial_stop(whole, stop)]

    def _completes_stop_string(self, token: int) -> bool:
        assert self.text is not None, "stop strings are refused without a tokenizer"
        added, sampling = self.text.append(token), self.request.sampling
        if len(self.tokens) - len(self.request.prompt) < sampling.min_tokens:
            return False
        ends: list[tuple[int, int, str]] = []
        for stop in sampling.stop:
            start = self.text.text.find(stop, max(0, len(self.text.text) - len(added) - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), start, stop))
        if not ends:
            return False
        end, start, self.stop_reason = min(ends)  # the first to be complete, and among those the longest
        self.text_end = end if sampling.include_stop_str_in_output else start
        return True


def _partial_stop(text: str, stops: Sequence[str]) -> int:
    """The number of characters at the end of a text that may be the start of a stop string."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


class Arrivals:
    """Requests without a slot, in order of arrival; one that follows another enters when that one is finished."""

    def __init__(self, requests: Sequence[Request], start_s: float) -> None:
        """start_s: clock reading from which arrivals count."""
        self._waiting: list[tuple[float, int, Generation]] = []
        self._order = count()  # of requests that arrive at the same time
        self._followers: dict[int, list[Request]] = {}
        for request in requests:
            if request.after is None:
                self._add(request, start_s)
            else:
                self._followers.setdefault(request.after, []).append(request)

    @property
    def next_s(self) -> float | None:
        """Clock reading at which the next request arrives; None if none is known."""
        return self._waiting[0][0] if self._waiting else None

    def pop(self) -> Generation:
        """The next request."""
        return heappop(self._waiting)[2]

    def finish(self, row: Generation) -> None:
        """Let the requests that follow a finished one arrive in their time."""
        for request in self._followers.pop(row.request.index, ()):
            self._add(request, row.last_token_s)

    def _add(self, request: Request, start_s: float) -> None:
        row = Generation(request, start_s + request.arrival_s)
        heappush(self._waiting, (row.arrival_s, next(self._order), row))


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a decode step.

    rows: row r uses cache slot r; None is an idle slot. sampling: the rows' parameters and token counts.
    num_slots: maximum number of rows. capacity: maximum tokens per slot.
    features: the target's features after each token of a row except its last, float [slots, capacity, hidden]; None
    unless the proposer needs them.
    recorder: replays work of fixed shapes, if it records. max_draft: maximum length of a draft.
    cache: the target's, which holds all tokens of each row except the last; later positions are free for writing.
    lag: steps launched before the outcome of one is read: 1 if whole steps are recorded, else 0.
    """

    rows: list[Generation | None]
    sampling: SamplingState
    num_slots: int
    capacity: int
    features: Tensor | None = None
    recorder: Recorder | None = None
    max_draft: int = 0
    cache: Any = None
    lag: int = 0

    @property
    def recording(self) -> Recorder | None:
        """The recorder if whole drafts can be recorded, because sampling depends only on tensors; else None."""
        return self.recorder if self.recorder and self.recorder.records and self.sampling.is_stateless else None

    def width(self, longest: int) -> int:
        """Padded width of a draft with `longest` tokens: always the maximum if recorded, to limit the shapes."""
        return self.max_draft if longest and self.recorder and self.recorder.records else longest

    def num_tokens(self) -> list[int]:
        """Number of tokens of each row, which is also the position of its next draft; 1 for an idle slot."""
        return [len(row.tokens) if row else 1 for row in self.rows]

    def last_tokens(self) -> list[int]:
        """The newest token of each row; 0 for an idle slot."""
        return [row.tokens[-1] if row else 0 for row in self.rows]


@dataclass(frozen=True, slots=True)
class Completion:
    """The output for one prompt, or for one of its samples.

    token_ids: emitted tokens, including the stop token. text: the continuation of the prompt, up to a stop string and
    without special tokens; None without tokenizer.
    logprobs: log-probability of each emitted token under the target's unprocessed logits, if requested. top_logprobs:
    for each emitted token, those of the most probable tokens in descending order, if requested.
    steps: one entry per decode step; the first token comes from the prefill and belongs to none.
    ttft_s, latency_s: seconds from the call, or from the prompt's arrival, to the first and to the last token. queue_s:
    time waiting for a slot, included in both. sample: from 0 to `SamplingParams.n` - 1.
    stop_reason: the stop token or stop string that ended it, if any.
    lossy: what keeps the tokens from following the target's distribution, such as a rule of `specdec.lossy`; None if
        they follow it.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    steps: tuple[Step, ...]
    ttft_s: float
    latency_s: float
    queue_s: float
    sample: int = 0
    top_logprobs: tuple[dict[int, float], ...] | None = None
    stop_reason: int | str | None = None
    lossy: str | None = None

    @property
    def sources(self) -> tuple[TokenSource, ...]:
        """The source of each emitted token; "plain" for the prefill and for steps without a draft."""
        return ("plain", *sources_of(self.steps))

    @property
    def counts(self) -> AcceptanceCounts:
        """The acceptance counters of this completion."""
        counts = AcceptanceCounts()
        for step in self.steps:
            counts.add_step(step.num_drafted, step.num_accepted, step.num_emitted, step.depth)
        return counts


@dataclass(frozen=True, slots=True)
class Chunk:
    """Streamed tokens of one prompt: those of the prefill or of one decode step.

    text: the text that became final, empty while a character is incomplete or the text may be the start of a stop
    string; None without tokenizer.
    completion: the whole output, in the last chunk of a prompt; else None. sample: as in the completion.
    """

    index: int
    token_ids: tuple[int, ...]
    sources: tuple[TokenSource, ...]
    text: str | None
    completion: Completion | None
    sample: int = 0
