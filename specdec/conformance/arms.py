"""One arm of an audit: judges outputs as they arrive, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
import torch
from numpy.typing import NDArray

from specdec.conformance.certificate import ArmFindings
from specdec.conformance.reference import Positions, Reference, Tokens
from specdec.conformance.statistics.betting import Shift, Wealth
from specdec.conformance.statistics.contexts import Contexts, seen_before
from specdec.conformance.statistics.facts import Facts
from specdec.conformance.statistics.instruments import INSTRUMENTS, Draws
from specdec.conformance.verdicts import AuditLimits
from specdec.proposers.ngram import LookupIndex
from specdec.sampling.randomness import uniforms

Array = NDArray[np.float64]

_MAX_ERRORS = 20  # reported in full; all are counted


@dataclass(frozen=True, slots=True)
class Answers:
    """An arm's outputs for some prompts. numbers: the prompts' numbers, for messages. seeds: one per prompt."""

    numbers: Sequence[int]
    prompts: Sequence[Tokens]
    seeds: Sequence[int]
    outputs: Sequence[Tokens]

    def name(self, index: int) -> str:
        return f"output of prompt {self.numbers[index]} with seed {self.seeds[index]}"


@dataclass(slots=True)
class Evidence:
    """The evidence collected by one instrument."""

    wealth: Wealth
    shift: Shift


@dataclass(frozen=True, slots=True)
class _Past:
    """guess: prompt lookup's for a token, or -1. followers: tokens that followed the same context before."""

    guess: int
    followers: Collection[int]


@dataclass(slots=True)
class _Repeats:
    """Outputs so far, to detect a repetition that is too unlikely to be chance."""

    log_alpha: float
    num_outputs: int = 0
    seen: dict[tuple[int, Tokens], int] = field(default_factory=dict)

    def check(self, answers: Answers, log_probs: Array) -> Iterator[str]:
        """Error messages. The k-th output raises a false alarm with probability at most alpha / (k (k + 1)), so all
        together with at most alpha.
        """
        for index, output in enumerate(answers.outputs):
            k, key = max(self.num_outputs, 1), (answers.numbers[index], tuple(output))
            threshold = self.log_alpha - math.log(k * k * (k + 1))
            if key in self.seen and log_probs[index] < threshold:
                yield (
                    f"{answers.name(index)} repeats the one with seed {self.seen[key]}, which has probability "
                    f"e^{log_probs[index]:.0f}; different seeds must give independent outputs"
                )
            self.seen[key] = answers.seeds[index]
            self.num_outputs += 1


class Arm:
    """Judges the outputs of one arm.

    number: the arm's number, which gives it its own random numbers. num_draws: number of tokens used as evidence.
    contexts: of earlier rounds and both arms, so that the same statistics are computed of two answers to a prompt. The
        caller adds the outputs of a round after both arms have observed it.
    """

    def __init__(
        self,
        number: int,
        reference: Reference,
        draft: Reference | None,
        num_draws: int,
        seed: int,
        limits: AuditLimits,
        contexts: Contexts,
    ) -> None:
        self._number, self._reference, self._draft, self._limits = number, reference, draft, limits
        self._contexts = contexts
        self._limit, self._key = num_draws, -1 - seed
        greedy = reference.sampling.temperature == 0
        self.names = [] if greedy else [name for name in INSTRUMENTS if draft or name != "draft"]
        self.num_tests = len(self.names) + 1  # plus the test for repeated outputs
        self.level = limits.alpha / self.num_tests
        self._evidence = {
            name: Evidence(Wealth(INSTRUMENTS[name].num_bets, self.level), Shift(INSTRUMENTS[name].span, num_draws))
            for name in self.names
        }
        self.num_statistics = 1 + sum(INSTRUMENTS[name].num_statistics for name in self.names)
        self._repeats = _Repeats(math.log(self.level))
        self._errors: list[str] = []
        self._num_errors = self._num_outputs = self.num_draws = self._num_judged = 0
        self._outside = {"by rounding": 0, "by more": 0}
        self._surprise = self._variance = self._largest_gap = 0.0
        self._last_place = 0.5
        self._seeds: tuple[int, int] | None = None

    @property
    def evidence(self) -> Iterable[Evidence]:
        """The evidence of each instrument so far."""
        return self._evidence.values()

    @property
    def has_errors(self) -> bool:
        return self._num_errors > 0

    def observe(self, answers: Answers, max_tokens: int) -> Array:
        """Judge outputs; returns each output's summed statistics, float64 [outputs, statistics].

        Raises ValueError for token ids outside the reference's vocabulary.
        """
        _check_vocabulary(answers, self._reference.vocab_size)
        for index in range(len(answers.outputs)):
            self._note(_wrong_end(answers, index, self._reference.stop_token_ids, max_tokens))
        self._num_outputs += len(answers.outputs)
        self._seeds = (self._seeds[0] if self._seeds else answers.seeds[0], answers.seeds[-1])
        sums, log_probs = np.zeros((len(answers.outputs), self.num_statistics)), np.zeros(len(answers.outputs))
        if not all(answers.outputs):
            return sums  # the empty output has been reported
        pasts = [self._past(*pair) for pair in zip(answers.prompts, answers.outputs, strict=True)]
        for positions, draft in self._distributions(answers):
            statistics = self._judge(answers, positions, draft, pasts, log_probs)
            np.add.at(sums, positions.requests.numpy(force=True), statistics)
        if self.names:
            for message in self._repeats.check(answers, log_probs):
                self._note(message)
        return sums

    def findings(self) -> ArmFindings:
        p_values = {name: each.wealth.p_value for name, each in self._evidence.items()}
        combined = min(1.0, self.num_tests * min(p_values.values(), default=1.0))
        p_values["support" if self.names else "equality"] = 0.0 if self._outside["by more"] else 1.0
        hidden = self._num_errors - len(self._errors)
        return ArmFindings(
            p_values=p_values,
            p_value=0.0 if self._outside["by more"] else combined,
            found_after={name: each.wealth.found_after for name, each in self._evidence.items()},
            shifts={name: each.shift.interval(self.level) for name, each in self._evidence.items() if self.num_draws},
            surprise_z=self._surprise / math.sqrt(self._variance) if self._variance > 0 else None,
            num_draws=self.num_draws,
            num_outputs=self._num_outputs,
            seeds=self._seeds or (0, 0),
            num_outside=dict(self._outside),
            largest_gap=self._largest_gap,
            errors=(*self._errors, *([f"and {hidden} more"] if hidden else [])),
        )

    def _distributions(self, answers: Answers) -> Iterator[tuple[Positions, Positions | None]]:
        distributions = self._reference.distributions(answers.prompts, answers.outputs)
        if self._draft is None or not self.names:
            return zip(distributions, repeat(None), strict=False)
        return zip(distributions, self._draft.distributions(answers.prompts, answers.outputs), strict=True)

    def _judge(
        self,
        answers: Answers,
        positions: Positions,
        draft: Positions | None,
        pasts: Sequence[Sequence[_Past]],
        log_probs: Array,
    ) -> Array:
        """Statistics of some positions, float64 [n, statistics]; adds evidence until num_draws is reached."""
        outside = positions.distribution.prob(positions.tokens) == 0
        for index in outside.nonzero().flatten().tolist():
            self._note_outside(answers, positions, index)
        columns, num_needed = [outside.double().numpy(force=True)[:, None]], self._limit - self.num_draws
        draws = self._draws(positions, draft, pasts) if self.names else None
        for name in self.names:
            assert draws is not None
            reading, evidence = INSTRUMENTS[name].read(draws), self._evidence[name]
            evidence.wealth.bet(reading.log_factors[:num_needed])
            evidence.shift.add(reading.shifts[:num_needed, 0])
            columns.append(reading.shifts)
        if draws is not None:
            self._add_surprise(draws.facts, num_needed, positions.requests.numpy(force=True), log_probs)
        self._num_judged += len(positions.tokens)
        self.num_draws = min(self._limit, self._num_judged)
        return np.concatenate(columns, 1)

    def _past(self, prompt: Tokens, output: Tokens) -> list[_Past]:
        """What was known before each token of an output."""
        return [*map(_Past, _guesses(prompt, output), self._contexts.followers(prompt, output))]

    def _draws(self, positions: Positions, draft: Positions | None, pasts: Sequence[Sequence[_Past]]) -> Draws:
        probs, tokens = positions.distribution.dense(), positions.tokens
        facts = Facts.of(probs, tokens, draft.distribution.dense() if draft else None)
        cells = zip(positions.requests.tolist(), positions.places.tolist(), strict=True)
        known = [pasts[request][place] for request, place in cells]
        seen_prob, seen = seen_before(probs, tokens, [past.followers for past in known])
        guess = torch.tensor([past.guess for past in known], device=tokens.device)
        guess_prob = probs.gather(1, guess.clamp(min=0).unsqueeze(1)).squeeze(1).double()
        place = facts.before + self._uniforms(0, len(tokens)) * facts.prob
        place_before = np.concatenate([[self._last_place], place[:-1]])
        self._last_place = float(place[-1])
        return Draws(
            facts=facts,
            rank=facts.above + self._uniforms(1, len(tokens)) * facts.prob,
            place=place,
            place_before=place_before,
            guess_prob=torch.where(guess < 0, math.nan, guess_prob).numpy(force=True),
            hit=(guess == tokens).double().numpy(force=True),
            seen_prob=seen_prob,
            seen=seen,
        )

    def _uniforms(self, role: int, count: int) -> Array:
        """Uniforms independent of any engine's: their key is not the seed of a request."""
        key, roles, arm = (torch.tensor([number]) for number in (self._key, role, self._number))
        places = torch.arange(self._num_judged, self._num_judged + count)
        return uniforms(key, places, roles, arm).numpy()

    def _add_surprise(self, facts: Facts, num_needed: int, requests: NDArray[np.int64], log_probs: Array) -> None:
        possible = facts.prob > 0
        logs = np.log(np.where(possible, facts.prob, 1.0))
        np.add.at(log_probs, requests, logs)
        self._surprise += float((logs + facts.entropy)[:num_needed][possible[:num_needed]].sum())
        self._variance += float(facts.variance[:num_needed].sum())

    def _note_outside(self, answers: Answers, positions: Positions, index: int) -> None:
        request, place = int(positions.requests[index]), int(positions.places[index])
        output = answers.outputs[request][: place + 1]
        gap = self._reference.gap(answers.prompts[request], output, positions.logits[index])
        if gap <= self._limits.logit_noise:
            self._outside["by rounding"] += 1
            self._largest_gap = max(self._largest_gap, gap)
            return
        self._outside["by more"] += 1
        distance = f"{gap:.3g} logits from being allowed" if math.isfinite(gap) else "whatever its precision"
        self._note(
            f"{answers.name(request)}: token {output[-1]} at position {place} has probability 0 under the reference, "
            f"{distance}"
        )

    def _note(self, message: str | None) -> None:
        if message:
            self._num_errors += 1
            if len(self._errors) < _MAX_ERRORS:
                self._errors.append(message)


def _check_vocabulary(answers: Answers, vocab_size: int) -> None:
    for index, output in enumerate(answers.outputs):
        for place, token in enumerate(output):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{answers.name(index)}: token {token} at position {place} must be below the reference's "
                    f"vocabulary of {vocab_size}; use the same vocabulary for engine and reference"
                )


def _wrong_end(answers: Answers, index: int, stop_token_ids: Collection[int], max_tokens: int) -> str | None:
    """An error message if an output does not end at its first stop token or after max_tokens."""
    output = answers.outputs[index]
    stop = next((place for place, token in enumerate(output) if token in stop_token_ids), None)
    end = max_tokens if stop is None else min(stop + 1, max_tokens)
    if len(output) == end:
        return None
    rule = f"max_tokens={max_tokens}" if stop is None or stop >= max_tokens else f"stop token {output[stop]} at {stop}"
    return f"{answers.name(index)} has {len(output)} tokens but must end after {end} ({rule})"


def _guesses(prompt: Tokens, output: Tokens) -> Iterator[int]:
    """The guess of prompt lookup for each token of an output; -1 if it has none."""
    index, tokens = LookupIndex(), list(prompt)
    for token in output:
        yield next(iter(index.continuation(tokens, 1)), -1)
        tokens.append(token)
