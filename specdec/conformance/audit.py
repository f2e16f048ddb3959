"""Audit any engine from its outputs: lossless, lossy or inconclusive.

An engine is two methods, generation with and without speculation, and two counters of its drafts. Both arms are tested
against the target's exact distributions and against each other.

An engine is called lossy only if the speculative arm is wrong *and* differs from the plain one, so that half-precision
arithmetic is not mistaken for a bug in speculation. It is called lossless only if a distance of `max_tv` would have
been detected and if it drafted and accepted tokens: with speculation silently off it would trivially be lossless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Protocol, runtime_checkable

from specdec.conformance.arms import Answers, Arm
from specdec.conformance.certificate import Findings, Speculation
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.statistics.betting import Exchangeability
from specdec.conformance.statistics.contexts import Contexts
from specdec.conformance.verdicts import DEFAULT_LIMITS, AuditLimits, bounds, judge
from specdec.runtime.progress import announce, bar, doing, is_shown
from specdec.sampling_params import SamplingParams

SEED_STRIDE = 1 << 20  # number of request seeds reserved for each audit seed
CALIBRATION_TOKENS = 16  # most tokens of each output by which the duration is estimated

Generate = Callable[[Sequence[Tokens], Sequence[int], int], list[list[int]]]


class AuditedEngine(Protocol):
    """The engine to audit. Both methods take the same arguments and use the reference's sampling parameters.

    An attribute `vocab_size`, if present, is compared with the reference's.

    Args:
        prompts: token ids of each prompt.
        seeds: one per prompt. The same prompt and seed may give the same output; different seeds must be independent.
        max_tokens: maximum number of tokens to emit.

    Returns:
        The emitted token ids of each prompt, including a stop token.
    """

    def speculative(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        """With speculation."""
        ...

    def plain(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        """The same engine without: the control arm."""
        ...


@runtime_checkable
class CountsDrafts(Protocol):
    """An engine that counts the draft tokens and accepted tokens of its speculative arm so far; None is unknown.

    No engine is called lossless without these counts, if one of them is 0 at the end, or if they contradict themselves:
    they fall, are unknown in between, or more tokens are accepted than drafted. They are read before the audit and
    after each batch of prompts.
    """

    @property
    def num_drafted(self) -> int | None: ...
    @property
    def num_accepted(self) -> int | None: ...


def audit(
    engine: AuditedEngine,
    reference: Reference,
    prompts: Sequence[Tokens],
    *,
    draft: Reference | None = None,
    num_draws: int = 20_000,
    batch_size: int = 8,
    seed: int = 0,
    limits: AuditLimits = DEFAULT_LIMITS,
    progress: bool = True,
) -> Findings:
    """Audit an engine on `num_draws` tokens of each arm, or fewer if they show that it is lossy.

    Args:
        engine: the engine to audit.
        reference: the target with the sampling parameters, including `max_tokens` and stop tokens. Temperature 0 is
            tested for equality.
        prompts: token ids; cycled as often as needed, but used only once if decoding is greedy.
        draft: the distributions that drafts are supposedly sampled from, for a test directed at them.
        num_draws: tokens per arm, at the most.
        batch_size: prompts per call of the engine.
        seed: the audit's seed; every request of both arms gets its own seed, from seed * SEED_STRIDE on.
        limits: error rates and the distance to detect.
        progress: if stderr is a terminal, say before the audit how many tokens it draws and about how long that takes,
            measured on a few outputs which are no evidence, and show a progress bar.

    Returns:
        The findings, with the verdict.

    Raises:
        ValueError: if vocabularies differ or there are no prompts.
    """
    _check(engine, reference, draft, prompts)
    if progress and is_shown():
        announce(expectation(engine, reference, prompts, draft=draft, num_draws=num_draws, batch_size=batch_size))
    counters = DraftCounters(engine)
    contexts = Contexts()
    arms = [Arm(number, reference, draft, num_draws, seed, limits, contexts) for number in range(2)]
    pair = Exchangeability(arms[0].num_statistics, limits.alpha)
    max_tokens, greedy = reference.sampling.max_tokens, reference.sampling.temperature == 0
    max_draws = min(num_draws, len(prompts) * max_tokens) if greedy else num_draws
    with bar(num_draws, "token", "audit, of each arm", shown=progress) as judged:
        for questions in _rounds(prompts, batch_size, seed * SEED_STRIDE, once=greedy):
            answers = [questions.ask(engine.speculative, 0, max_tokens), questions.ask(engine.plain, 1, max_tokens)]
            counters.read()
            sums = [arm.observe(answer, max_tokens) for arm, answer in zip(arms, answers, strict=True)]
            pair.observe(*sums)
            for answer in answers:
                contexts.add(answer.prompts, answer.outputs)
            fewest = min(arm.num_draws for arm in arms)
            judged.update(min(fewest, num_draws) - judged.n)
            if any(arm.has_errors for arm in arms) or fewest >= num_draws or _is_decided(arms, pair, limits):
                break
        else:  # every prompt was used; outputs that ended early leave fewer tokens than there could have been
            max_draws = arms[0].num_draws
    return _findings(arms, pair.wealth.p_value, reference.sampling, limits, counters.speculation(), max_draws)


class DraftCounters:
    """Follows an engine's counters of its drafts, from its construction on."""

    def __init__(self, engine: object) -> None:
        self._engine = engine
        self._first = self._last = self._counts()
        self._problem = self._why_invalid(self._first)

    def read(self) -> None:
        """Read the counters, which must never be missing or decrease once there; the first problem is kept."""
        counts = self._counts()
        self._problem = self._problem or self._why_invalid(counts) or self._why_discontinuous(counts)
        self._last = counts

    def speculation(self) -> Speculation | None:
        """The counts since the construction; None if the engine has no counters, or if they were always None."""
        if self._problem:
            return Speculation(0, 0, self._problem)
        if self._first is None or self._last is None:
            return None
        num_drafted, num_accepted = (last - first for first, last in zip(self._first, self._last, strict=True))
        if num_accepted > num_drafted:
            return Speculation(
                num_drafted,
                num_accepted,
                f"num_accepted={num_accepted} must not exceed num_drafted={num_drafted}; count the same steps in both",
            )
        return Speculation(num_drafted, num_accepted)

    def _counts(self) -> tuple[int, int] | None:
        if not isinstance(self._engine, CountsDrafts):
            return None
        num_drafted, num_accepted = self._engine.num_drafted, self._engine.num_accepted
        return None if num_drafted is None or num_accepted is None else (num_drafted, num_accepted)

    def _why_invalid(self, counts: tuple[int, int] | None) -> str | None:
        """The counters come from an engine of someone else, so that their types are not known to be right."""
        if counts is None or all(isinstance(count, int) and count >= 0 for count in counts):
            return None
        return f"num_drafted={counts[0]!r} and num_accepted={counts[1]!r} must be whole numbers, at least 0"

    def _why_discontinuous(self, counts: tuple[int, int] | None) -> str | None:
        if (counts is None) != (self._last is None):
            return (
                "num_drafted and num_accepted must be known throughout an audit, but were missing in a part of it; "
                "start them at 0 and count every step"
            )
        if counts is None or self._last is None:
            return None
        for name, now, before in zip(("num_drafted", "num_accepted"), counts, self._last, strict=True):
            if now < before:
                return (
                    f"{name} must never decrease, but fell from {before} to {now}; count from the engine's start, and "
                    "do not restart it during an audit"
                )
        return None


def expectation(
    engine: AuditedEngine,
    reference: Reference,
    prompts: Sequence[Tokens],
    *,
    draft: Reference | None = None,
    num_draws: int = 20_000,
    batch_size: int = 8,
) -> str:
    """How many tokens an audit draws and about how long it takes; arguments as for `audit`.

    The time per token is measured on one batch of short outputs, after one that warms up. It includes reading the
    prompts, so that longer outputs take less.
    """
    if reference.sampling.temperature == 0:  # each prompt is used once
        num_draws = min(num_draws, len(prompts) * reference.sampling.max_tokens)
    with doing("measuring how long the audit takes"):
        seconds = num_draws * _seconds_per_token(engine, reference, prompts[:batch_size], draft)
    return f"audit: {num_draws:,} tokens of each arm, about {_duration(seconds)}"


def _seconds_per_token(
    engine: AuditedEngine, reference: Reference, prompts: Sequence[Tokens], draft: Reference | None
) -> float:
    """Seconds per token of each arm, judging included."""
    max_tokens = min(CALIBRATION_TOKENS, reference.sampling.max_tokens)
    most = max_tokens * len(prompts)
    arms = [Arm(number, reference, draft, most, 0, DEFAULT_LIMITS, Contexts()) for number in range(2)]
    for repeat in range(2):  # the first one warms up
        seed = SEED_STRIDE // 2 + 2 * repeat * len(prompts)  # the evidence has other seeds: lower ones
        questions, start_s = _Questions(range(len(prompts)), prompts, seed), time.perf_counter()
        answers = [questions.ask(engine.speculative, 0, max_tokens), questions.ask(engine.plain, 1, max_tokens)]
        for arm, answer in zip(arms, answers, strict=True):
            arm.observe(answer, max_tokens)
        seconds = time.perf_counter() - start_s
    return seconds / max(1, min(sum(map(len, answer.outputs)) for answer in answers))


def _duration(seconds: float) -> str:
    """In the largest unit of which it has at least two."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 2 * 60 else f"{max(2, seconds):.0f} seconds"


@dataclass(frozen=True, slots=True)
class _Questions:
    """A batch of prompts with their numbers; seed: of the first prompt in the first arm."""

    numbers: Sequence[int]
    prompts: Sequence[Tokens]
    seed: int

    def ask(self, generate: Generate, arm: int, max_tokens: int) -> Answers:
        """Generate with seeds that no other arm uses; shared seeds would make the arms dependent."""
        seeds = [self.seed + 2 * index + arm for index in range(len(self.prompts))]
        outputs = generate(self.prompts, seeds, max_tokens)
        if len(outputs) != len(self.prompts):
            raise ValueError(
                f"the engine returned {len(outputs)} outputs but must return one per prompt, {len(self.prompts)}"
            )
        return Answers(self.numbers, self.prompts, seeds, outputs)


def _rounds(prompts: Sequence[Tokens], batch_size: int, seed: int, once: bool) -> Iterator[_Questions]:
    """Batches of prompts, once or endlessly."""
    numbers = range(len(prompts)) if once else cycle(range(len(prompts)))
    for count, chosen in enumerate(_batched(numbers, batch_size)):
        yield _Questions(chosen, [prompts[number] for number in chosen], seed + 2 * count * batch_size)


def _batched(numbers: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """itertools.batched, which Python 3.11 lacks."""
    rest = iter(numbers)
    while chosen := tuple(islice(rest, size)):
        yield chosen


def _check(engine: AuditedEngine, reference: Reference, draft: Reference | None, prompts: Sequence[Tokens]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("prompts must hold at least one prompt and no empty one; pass token ids")
    others = {"engine": getattr(engine, "vocab_size", None), "draft": draft.vocab_size if draft else None}
    for name, vocab_size in others.items():
        if vocab_size not in (None, reference.vocab_size):
            raise ValueError(
                f"the {name}'s vocabulary of {vocab_size} tokens must equal the reference's, {reference.vocab_size}; "
                "audit an engine against the model it serves"
            )


def _is_decided(arms: Sequence[Arm], pair: Exchangeability, limits: AuditLimits) -> bool:
    """Whether the engine is lossy, by a distance that is bounded from below; no further token can change that.

    Both p-values are of bets, so that each stays above alpha with probability 1 - alpha, however often it is looked at,
    and the bound holds whenever the audit stops. "lossless" needs the planned number of tokens: it claims that a
    distance would have been found in them.
    """
    if pair.wealth.p_value > limits.alpha or all(each.wealth.found_after is None for each in arms[0].evidence):
        return False
    return bounds(arms[0].findings(), arms[0].level, limits).tv_lower_bound > 0


def _findings(
    arms: Sequence[Arm],
    arms_p_value: float,
    sampling: SamplingParams,
    limits: AuditLimits,
    speculation: Speculation | None,
    max_draws: int,
) -> Findings:
    known = speculation if speculation and not speculation.problem else None
    speculative, control = (arm.findings() for arm in arms)
    found = bounds(speculative, arms[0].level, limits, max_draws)
    verdict, reasons = judge(speculative, control, arms_p_value, found.num_draws_needed, limits, speculation)
    return Findings(
        verdict=verdict,
        reasons=reasons,
        speculative=speculative,
        control=control,
        arms_p_value=arms_p_value,
        **asdict(found),
        **asdict(limits),
        sampling=asdict(sampling),
        num_drafted=known.num_drafted if known else None,
        num_accepted=known.num_accepted if known else None,
    )
