"""A served model as an engine to audit: one arm with speculation, one without, on one server or on two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from specdec.conformance.served.dialects import Dialect, Question, Reply
from specdec.conformance.served.logprobs import Reported
from specdec.conformance.served.tokens import TokenRecovery, UnclearTokensError
from specdec.sampling_params import SamplingParams
from specdec.servers.client import Client, retried
from specdec.servers.errors import EngineError
from specdec.servers.metrics import DraftCounter, DraftCounts

NUM_DRAWS = 5  # of an output until its tokens are certain
REDRAW_STRIDE = 1 << 28  # between the seeds of these; an audit's own seeds are below it
FEW = 5  # outputs left out that are never too many


@dataclass(frozen=True, slots=True)
class Place:
    """Where an arm's requests go. fields: of each request, such as those that switch speculation off."""

    client: Client
    dialect: Dialect
    model: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A completion, all replies until it, and why the others were left out."""

    tokens: tuple[int, ...]
    replies: Sequence[Reply]
    left_out: Sequence[str]


class ServedArm:
    """One arm of the audit: asks for outputs and counts what came back.

    texts: what each prompt is encoded from. concurrency: requests at once. max_left_out: largest share of outputs whose
    tokens may be uncertain; they are left out and drawn again.
    """

    def __init__(
        self,
        place: Place,
        recovery: TokenRecovery,
        sampling: SamplingParams,
        texts: Mapping[tuple[int, ...], str],
        *,
        concurrency: int,
        max_left_out: float,
    ) -> None:
        self._place, self._recovery, self._sampling, self._texts = place, recovery, sampling, texts
        self._concurrency, self._max_left_out = concurrency, max_left_out
        self._counter = DraftCounter()
        self._before = self._page()
        self.num_requests = self.num_outputs = 0
        self.left_out: Counter[str] = Counter()
        self._drafts: tuple[int, int] | None = None  # that replies reported; None if none did
        self.repeats: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
        self.had_token_ids = True
        self.reported: list[Reported] = []  # outputs with log-probabilities, if the sampling parameters ask for them

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        """An output per prompt. Raises EngineError."""
        with ThreadPoolExecutor(self._concurrency) as threads:
            jobs = [threads.submit(self._draw, *pair, max_tokens) for pair in zip(prompts, seeds, strict=True)]
            try:
                drawn = [job.result() for job in jobs]
            except EngineError:
                self._place.client.abort()
                raise
        for prompt, output in zip(prompts, drawn, strict=True):
            self._count(prompt, output)
        if self.num_left_out > FEW + 2 * self._max_left_out * self.num_outputs:
            raise EngineError(self.doubts()[0])
        return [list(output.tokens) for output in drawn]

    def _count(self, prompt: Sequence[int], output: _Drawn) -> None:
        self.num_outputs += 1
        self.num_requests += len(output.replies)
        self.left_out.update(output.left_out)
        self.repeats[tuple(prompt), output.tokens] += 1
        if self._sampling.logprobs:
            self.reported.append(_reported(prompt, output))
        for reply in output.replies:
            self.had_token_ids &= reply.token_ids is not None
            if reply.num_drafted is not None and reply.num_accepted is not None:
                drafted, accepted = self._drafts or (0, 0)
                self._drafts = (drafted + reply.num_drafted, accepted + reply.num_accepted)

    @property
    def num_left_out(self) -> int:
        return self.left_out.total()

    def doubts(self) -> list[str]:
        """Why the outputs may not be those that the server sampled."""
        if self.num_left_out <= self._max_left_out * self.num_outputs:
            return []
        example, number = self.left_out.most_common(1)[0]
        return [
            f"the tokens of {self.num_left_out} of {self.num_outputs + self.num_left_out} outputs are uncertain, more "
            f"than a share of {self._max_left_out:.2g}; {number} times: {example}"
        ]

    def drafts(self) -> tuple[int, int] | None:
        """Draft tokens and accepted tokens so far; None if they are not reported, or if others use the server, too."""
        if self._drafts is not None or self.num_requests == 0:
            return self._drafts or (0, 0)
        after, before = self._page(), self._before
        if after is None or before is None:
            return None
        if before.num_finished is not None and after.num_finished is not None:
            num_others = after.num_finished - before.num_finished - self.num_requests
            if num_others:
                return None
        return after.num_drafted - before.num_drafted, after.num_accepted - before.num_accepted

    def _page(self) -> DraftCounts | None:
        """The counters of the server's metrics page; None if it has none."""
        try:
            return self._counter.read(self._place.client.get("/metrics"))
        except EngineError:
            return None

    def _draw(self, prompt: Sequence[int], seed: int, max_tokens: int) -> _Drawn:
        """A completion whose tokens are certain; others are left out and drawn again with another seed."""
        replies: list[Reply] = []
        left_out: list[str] = []
        for attempt in range(NUM_DRAWS):
            question = self._question(prompt, seed + attempt * REDRAW_STRIDE, max_tokens)
            body = self._place.dialect.request(question, self._place.fields)
            replies.append(self._place.dialect.reply(self._answer(body)))
            try:
                return _Drawn(self._recovery.tokens(question, replies[-1]), replies, left_out)
            except UnclearTokensError as error:
                left_out.append(str(error))
        raise EngineError(f"the tokens of {NUM_DRAWS} completions in a row are uncertain: {left_out[-1]}")

    def _question(self, prompt: Sequence[int], seed: int, max_tokens: int) -> Question:
        stop = sorted(self._recovery.stop_token_ids)
        text = self._texts[tuple(prompt)]
        return Question(self._place.model, prompt, text, seed, max_tokens, self._sampling, stop)

    def _answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return retried(lambda: self._place.client.post(self._place.dialect.path, body))


def _reported(prompt: Sequence[int], output: _Drawn) -> Reported:
    """The last reply's log-probabilities. Raises EngineError unless there is one for each token it has."""
    tokens, logprobs = output.tokens, output.replies[-1].logprobs
    if logprobs is None:
        raise EngineError("the server must report log-probabilities, but its reply has none; leave out --logprobs")
    if len(logprobs) not in (len(tokens), len(tokens) - 1):
        raise EngineError(f"the server must report {len(tokens)} log-probabilities, but sent {len(logprobs)}")
    return Reported(tuple(prompt), tokens, logprobs)


class ServedEngine:
    """An `AuditedEngine` of two arms over HTTP."""

    def __init__(self, speculative: ServedArm, control: ServedArm) -> None:
        self.arms = (speculative, control)

    def speculative(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        return self.arms[0].generate(prompts, seeds, max_tokens)

    def plain(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        return self.arms[1].generate(prompts, seeds, max_tokens)

    @property
    def num_drafted(self) -> int | None:
        drafts = self.arms[0].drafts()
        return drafts[0] if drafts else None

    @property
    def num_accepted(self) -> int | None:
        drafts = self.arms[0].drafts()
        return drafts[1] if drafts else None

    def doubts(self) -> Iterator[str]:
        """Why no verdict may rest on these outputs."""
        for name, arm in zip(("with speculation", "without speculation"), self.arms, strict=True):
            yield from (f"{name}, {doubt}" for doubt in arm.doubts())
        drafts = self.arms[1].drafts()
        if drafts and drafts[0]:
            yield f"the control arm must not speculate, but drafted {drafts[0]} tokens; switch its speculation off"
