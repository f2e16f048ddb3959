"""Audits of an engine from what it emits: lossless, lossy, or not enough to tell.

An engine is two methods, the same prompts with speculation and without, and two counts of what it drafted. Both arms
are judged against the target's exact distributions, and against each other. So that arithmetic in half precision is
not mistaken for a bug in speculation, an engine is called lossy only if the speculative arm is wrong *and* differs
from the plain one. So that silence is not mistaken for proof, it is called lossless only if a distance of `max_tv`
would have been seen, and only if it drafted tokens and accepted some: with speculation silently off it says what plain
decoding does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Protocol, runtime_checkable

from specdec.conformance.arms import Answers, Arm
from specdec.conformance.betting import Exchangeability
from specdec.conformance.certificate import Findings, Speculation
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.verdicts import DEFAULT_LIMITS, Limits, bounds, judge
from specdec.runtime.progress import bar
from specdec.sampling_params import SamplingParams

SEED_STRIDE = 1 << 20  # seeds of requests that an audit's own seed has to itself

Generate = Callable[[Sequence[Tokens], Sequence[int], int], list[list[int]]]


class AuditedEngine(Protocol):
    """What is audited. Both methods return the emitted token ids of each prompt, a stop token included.

    prompts: token ids. seeds: one for each prompt; the same seed and prompt again may give the same output, another
    seed must be independent of it. max_tokens: tokens to emit at the most. The sampling parameters are those that the
    reference was made with. An attribute `vocab_size` is compared with the reference's, if there is one.
    """

    def speculative(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        """With speculation."""
        ...

    def plain(self, prompts: Sequence[Tokens], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        """The same engine without: the control arm."""
        ...


@runtime_checkable
class CountsDrafts(Protocol):
    """An audited engine that counts what its speculative arm has drafted and accepted so far, in tokens.

    None is unknown. Without these counts, or where one is 0, no engine is called lossless.
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
    limits: Limits = DEFAULT_LIMITS,
    progress: bool = True,
) -> Findings:
    """Judge an engine by `num_draws` tokens of each arm.

    reference: the target and the sampling parameters, `max_tokens` and stop tokens included; temperature 0 is judged by
        equality. prompts: token ids, taken in turn as often as needed, but once only if decoding is greedy.
    draft: the distributions that the draft is thought to be drawn from, for the test that is directed at it.
    batch_size: prompts that an engine is given at a time. seed: of the audit; requests of all arms get seeds of their
        own, from seed * SEED_STRIDE on.
    progress: where stderr is a terminal, show how many tokens are judged, and about how long the rest will take.
    Raises ValueError if the vocabularies differ, or if there are no prompts.
    """
    _check(engine, reference, draft, prompts)
    arms = [Arm(number, reference, draft, num_draws, seed, limits) for number in range(2)]
    pair = Exchangeability(arms[0].num_statistics, limits.alpha)
    max_tokens, greedy = reference.sampling.max_tokens, reference.sampling.temperature == 0
    with bar(num_draws, "token", "audit, of each arm", shown=progress) as judged:
        for questions in _rounds(prompts, batch_size, seed * SEED_STRIDE, once=greedy):
            answers = [questions.ask(engine.speculative, 0, max_tokens), questions.ask(engine.plain, 1, max_tokens)]
            sums = [arm.observe(answer, max_tokens) for arm, answer in zip(arms, answers, strict=True)]
            pair.observe(*sums)
            fewest = min(arm.num_draws for arm in arms)
            judged.update(min(fewest, num_draws) - judged.n)
            if any(arm.has_errors for arm in arms) or fewest >= num_draws:
                break
    return _findings(arms, pair.wealth.p_value, reference.sampling, limits, _speculation(engine))


def _speculation(engine: AuditedEngine) -> Speculation | None:
    counts = (engine.num_drafted, engine.num_accepted) if isinstance(engine, CountsDrafts) else (None, None)
    return None if counts[0] is None or counts[1] is None else Speculation(counts[0], counts[1])


@dataclass(frozen=True, slots=True)
class _Questions:
    """Prompts by their numbers, and the seed of the first in the first arm."""

    numbers: Sequence[int]
    prompts: Sequence[Tokens]
    seed: int

    def ask(self, generate: Generate, arm: int, max_tokens: int) -> Answers:
        """Each arm has seeds of its own: arms that share them would not be independent."""
        seeds = [self.seed + 2 * index + arm for index in range(len(self.prompts))]
        outputs = generate(self.prompts, seeds, max_tokens)
        if len(outputs) != len(self.prompts):
            raise ValueError(
                f"the engine gave {len(outputs)} outputs and must give one for each of {len(self.prompts)} prompts"
            )
        return Answers(self.numbers, self.prompts, seeds, outputs)


def _rounds(prompts: Sequence[Tokens], batch_size: int, seed: int, once: bool) -> Iterator[_Questions]:
    """Prompts in turn, for ever or once."""
    numbers = range(len(prompts)) if once else cycle(range(len(prompts)))
    for count, chosen in enumerate(_batched(numbers, batch_size)):
        yield _Questions(chosen, [prompts[number] for number in chosen], seed + 2 * count * batch_size)


def _batched(numbers: Iterable[int], size: int) -> Iterator[tuple[int, ...]]:
    """As itertools.batched, which Python 3.11 has not."""
    rest = iter(numbers)
    while chosen := tuple(islice(rest, size)):
        yield chosen


def _check(engine: AuditedEngine, reference: Reference, draft: Reference | None, prompts: Sequence[Tokens]) -> None:
    if not prompts or not all(prompts):
        raise ValueError("prompts must be at least one, and none may be empty; give token ids")
    others = {"engine": getattr(engine, "vocab_size", None), "draft": draft.vocab_size if draft else None}
    for name, vocab_size in others.items():
        if vocab_size not in (None, reference.vocab_size):
            raise ValueError(
                f"the {name}'s vocabulary of {vocab_size} tokens must be the reference's, {reference.vocab_size}; "
                "audit an engine against the model that it serves"
            )


def _findings(
    arms: Sequence[Arm],
    arms_p_value: float,
    sampling: SamplingParams,
    limits: Limits,
    speculation: Speculation | None,
) -> Findings:
    speculative, control = (arm.findings() for arm in arms)
    found = bounds(speculative, arms[0].level, limits)
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
        num_drafted=speculation.num_drafted if speculation else None,
        num_accepted=speculation.num_accepted if speculation else None,
    )
