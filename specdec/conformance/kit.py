"""Certify that decoding with a proposer is lossless: the output has exactly the target's distribution.

    def test_my_proposer_is_lossless():
        certify_proposer(lambda target, uniforms: MyProposer(target.vocab_size, target.device, uniforms))

A proposer makes the output wrong if its draft declares another distribution than that of its tokens, or if decisions
about a draft depend on its own draws. Five checks detect this:

* *draws*: for every possible draft on the toys, the probability of each token is the declared one;
* *enumeration*: the joint output distribution of the real loop on the toys is the target's, over all uniforms;
* *identity*: in ragged batches, greedy output equals plain decoding, and so does coupled output for each seed;
* *gate*: with the real random generator, in ragged batches with rows that end early, the output passes a test with the
  error rates stated in `gates`, under token and block verification;
* *mutants*: the first two checks refuse the same proposer with a wrong declared distribution. If they do not, the toys
  cannot reveal this proposer's errors, and it is not certified.

A proposer is created for targets with two and three tokens, must propose chains, and draws token i of a draft with the
uniform of `Role.DRAFT` at its position, as `specdec.proposers.chain.draw_chain` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from specdec.conformance.enumeration import Tokens, exact_distribution
from specdec.conformance.gates import distance, marginal, passes, radius
from specdec.conformance.probes import (
    TOLERANCE,
    MakeProposer,
    NotCertified,
    Place,
    Steps,
    Toy,
    probe,
)
from specdec.conformance.toys import FeatureTarget, joint_distribution, table
from specdec.decoding import Decoder
from specdec.proposers.base import Proposer
from specdec.requests import Batch, Generation, Request
from specdec.sampling.distributions import Dense
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.sampling_params import SamplingParams
from specdec.verification import Draft, VerificationRule, verify_block, verify_coupled, verify_tokens

COINS = torch.tensor([[1, 3], [2, 2], [3, 1], [4, 0]]).double() / 4
TOYS = (
    Toy("three tokens", FeatureTarget(table(12)), (0, 1, 2, 0, 1, 2, 0), 4, 1, stop_token_ids=(2,)),
    Toy("two tokens", FeatureTarget(table(3, COINS)), (0, 1, 1, 0, 1), 4, 2),
)
GATE_TARGET: Any = TOYS[0].target
GATE_PROMPT = TOYS[0].prompt
NUM_DRAWS, SUPPORT, NUM_SLOTS = 2100, 9, 64
MAX_ENUMERATIONS = 4  # repetitions until no new distribution is declared
VISIBLE = 1e-4  # minimum distance from the truth that counts as detected


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result for a proposer that passed all checks.

    num_drafted, num_accepted: tokens in the runs of the gate. min_detectable_tv: the total variation distance of two
    neighboring tokens that the gate misses with probability at most 1e-6. num_mutants: number of refused mutants.
    """

    num_drafted: int
    num_accepted: int
    min_detectable_tv: float
    num_mutants: int

    def __str__(self) -> str:
        return (
            f"certified: exact on {len(TOYS)} toys, {self.num_accepted} of {self.num_drafted} drafted tokens accepted, "
            f"within the gate (sees TV > {self.min_detectable_tv:.2f}), {self.num_mutants} mutants refused"
        )


def certify_proposer(make_proposer: MakeProposer) -> Certificate:
    """Certify that decoding with a proposer is lossless; a few seconds.

    make_proposer: (target, uniforms) -> a new proposer for a target with two or three tokens, which draws from
    `uniforms`. It is called often.
    Raises NotCertified, an AssertionError with one sentence about the error and its location.
    """
    checked = _wrap(make_proposer, _Checked)
    for toy in TOYS:
        _check_exact(toy, checked)
    num_mutants = sum(_refuses(checked, name, mutant) for name, mutant in MUTANTS.items())
    if not num_mutants:
        raise NotCertified("the proposer proposed nothing on the toys, so nothing is known about its drafts")
    _check_identity(checked, verify_tokens, SamplingParams(temperature=0))
    _check_identity(checked, verify_coupled, SamplingParams())
    rows = [row for rule in (verify_tokens, verify_block) for row in _gate(checked, rule)]
    steps = [step for row in rows for step in row.steps]
    return Certificate(
        sum(step.num_drafted for step in steps),
        sum(step.num_accepted for step in steps),
        2 * radius(NUM_DRAWS, SUPPORT),
        num_mutants,
    )


def _wrap(make_proposer: MakeProposer, wrapper: Callable[[Proposer], Proposer]) -> MakeProposer:
    return lambda target, source: wrapper(make_proposer(target, source))


# ---- exact checks


def _check_exact(toy: Toy, make_proposer: MakeProposer) -> None:
    steps = Steps(toy)
    probe(toy, make_proposer, steps)
    found, truth = _enumerate(toy, make_proposer, steps), _truth(toy)
    if distance(found, truth) > TOLERANCE:
        worst = max(found.keys() | truth.keys(), key=lambda tokens: abs(found.get(tokens, 0) - truth.get(tokens, 0)))
        raise NotCertified(
            f"on the toy {toy.name!r} the output is at a distance of {distance(found, truth):.4g} (total variation) "
            f"from the target's distribution: {list(worst)} has probability {found.get(worst, 0):.6g}, and must have "
            f"{truth.get(worst, 0):.6g}"
        )


def _truth(toy: Toy) -> dict[Tokens, float]:
    return joint_distribution(toy.target, toy.prompt, toy.num_tokens, stop_token_ids=toy.stop_token_ids)


def _enumerate(toy: Toy, make_proposer: MakeProposer, steps: Steps) -> dict[Tokens, float]:
    """The output's exact distribution; repeated while the proposer declares distributions missing in `steps`."""
    target: Any = toy.target

    def make(source: UniformSource, rule: VerificationRule, max_batch_size: int) -> Decoder:
        return Decoder(
            target,
            _Recording(make_proposer(toy.target, source), steps),
            toy.num_speculative_tokens,
            max_batch_size=max_batch_size,
            rule=rule,
            uniforms=source,
            records=False,
        )

    params = SamplingParams(stop_token_ids=toy.stop_token_ids)
    for _ in range(MAX_ENUMERATIONS):
        size = steps.size
        found = exact_distribution(make, toy.prompt, toy.num_tokens, steps.grid, params)
        if steps.size == size:
            return found
    raise NotCertified(
        f"on the toy {toy.name!r} the proposer still declares new distributions when the same steps are decoded for "
        f"the {MAX_ENUMERATIONS}th time; its drafts must depend only on the text, the uniforms and the outcome of "
        "earlier drafts"
    )


class _Wrapper(Proposer):
    """Delegates to a proposer."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.feature_layers = proposer.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        return self._proposer.propose(batch, limits)


class _Recording(_Wrapper):
    """Records the declared distributions by place."""

    def __init__(self, proposer: Proposer, steps: Steps) -> None:
        super().__init__(proposer)
        self._steps = steps

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        probs, tokens = draft.distribution.dense().tolist(), draft.tokens.tolist()
        for index, (row, length) in enumerate(zip(batch.rows, draft.num_proposed.tolist(), strict=True)):
            for depth in range(length if row else 0):
                assert row
                self._steps.add(Place(tuple(row.output), tuple(tokens[index][:depth])), probs[index][depth])
        return draft


class _Checked(_Wrapper):
    """Checks every draft for consistency."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        if draft.tree is not None:
            raise NotCertified("the proposer drafts trees, but the kit certifies chains; set num_speculative_tokens")
        num_rows, width = draft.tokens.shape
        if num_rows != len(batch.rows):
            raise NotCertified(f"a draft has {num_rows} rows, and must have the batch's {len(batch.rows)}")
        for row, (length, limit) in enumerate(zip(draft.num_proposed.tolist(), limits, strict=True)):
            if not 0 <= length <= min(limit, width):
                raise NotCertified(f"row {row} of a draft has length {length}, and must have at most {limit}")
        _check_distributions(draft, batch.sampling.vocab_size)
        return draft


def _check_distributions(draft: Draft, vocab_size: int) -> None:
    proposed = torch.arange(draft.tokens.shape[1]) < draft.num_proposed.unsqueeze(1)
    tokens, probs = draft.tokens[proposed], draft.distribution.dense()[proposed]
    if probs.shape[-1] != vocab_size or ((tokens < 0) | (tokens >= vocab_size)).any():
        raise NotCertified(f"drafts must be over the target's {vocab_size} tokens, not over {probs.shape[-1]}")
    if (probs < 0).any() or ((probs.double().sum(-1) - 1).abs() > 1e-4).any():
        raise NotCertified("a declared distribution must have probabilities >= 0 that sum to 1")
    if len(tokens) and (probs.gather(-1, tokens.unsqueeze(-1)) == 0).any():
        raise NotCertified("a draft has a token to which its own declared distribution gives probability 0")


# ---- mutants


class _Flattened(_Wrapper):
    """Declares a mixture with the uniform distribution."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        probs = draft.distribution.dense().double()
        return replace(draft, distribution=Dense((probs + 1 / probs.shape[-1]) / 2))


class _Tilted(_Wrapper):
    """Declares a higher probability of the first token than it is drawn with."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        probs = draft.distribution.dense().double() / 2
        probs[..., 0] += 0.5
        return replace(draft, distribution=Dense(probs))


class _Greedy(_Wrapper):
    """Proposes the most probable token of the declared distribution."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = super().propose(batch, limits)
        return replace(draft, tokens=draft.distribution.dense().argmax(-1)) if draft.tokens.shape[1] else draft


MUTANTS: dict[str, Callable[[Proposer], Proposer]] = {
    "declares a flattened distribution": _Flattened,
    "declares the first token likelier": _Tilted,
    "proposes the likeliest token": _Greedy,
}


def _refuses(make_proposer: MakeProposer, name: str, mutant: Callable[[Proposer], Proposer]) -> bool:
    """Whether both exact checks refuse a mutant; False if it behaves like the original."""
    toy, broken, seen = TOYS[0], _wrap(make_proposer, mutant), list[str]()
    steps = Steps(toy)
    try:
        probe(toy, broken, steps)
    except NotCertified:
        seen.append("draws")
    if distance(_enumerate(toy, broken, steps), _truth(toy)) > VISIBLE:
        seen.append("enumeration")
    if len(seen) == 1:
        raise NotCertified(
            f"the proposer cannot be certified: changed so that it {name}, it is refused by the check of {seen[0]} "
            f"only, so the toy {toy.name!r} does not show the errors of its drafts"
        )
    return bool(seen)


# ---- ragged batches


def _check_identity(make_proposer: MakeProposer, rule: VerificationRule, params: SamplingParams) -> None:
    requests = [
        Request(index, GATE_PROMPT[: 1 + index % 7], replace(params, max_tokens=1 + 5 * index % 13, seed=index), stop)
        for index, stop in enumerate([frozenset[int](), frozenset({1})] * 8)
    ]
    found, plain = (_outputs(proposer, rule, requests, 3) for proposer in (make_proposer, None))
    for request, row, expected in zip(requests, found, plain, strict=True):
        if row.output != expected.output:
            how = "greedy" if params.temperature == 0 else "coupled"
            raise NotCertified(
                f"{how} output must be that of plain decoding, but for prompt {list(request.prompt)} and "
                f"max_tokens={request.sampling.max_tokens} it is {row.output} instead of {expected.output}"
            )


def _gate(make_proposer: MakeProposer, rule: VerificationRule) -> list[Generation]:
    """The rows of a run with real uniforms; every fourth request is a batch mate that ends early or is greedy."""
    mates = (
        Request(0, (1,), SamplingParams(max_tokens=9), frozenset({0})),
        Request(0, (0, 2, 1), SamplingParams(max_tokens=2, temperature=0)),
        Request(0, (2, 2), SamplingParams(max_tokens=7, top_k=2)),
        Request(0, (0, 1, 0, 1), SamplingParams(max_tokens=1)),
    )
    params = SamplingParams(max_tokens=4)
    requests = [
        mates[index // 4 % 4] if index % 4 == 3 else Request(0, GATE_PROMPT, params)
        for index in range(NUM_DRAWS * 4 // 3)
    ]
    requests = [
        replace(request, index=index, sampling=replace(request.sampling, seed=index))
        for index, request in enumerate(requests)
    ]
    rows = _outputs(make_proposer, rule, requests, NUM_SLOTS)
    outputs = [tuple(row.output) for row in rows if row.request.index % 4 != 3]
    truth = joint_distribution(GATE_TARGET, GATE_PROMPT, 4)
    for first in range(3):
        pairs = [output[first : first + 2] for output in outputs]
        if not passes(pairs, marginal(truth, (first, first + 1)), SUPPORT):
            raise NotCertified(
                f"tokens {first + 1} and {first + 2} of {len(pairs)} outputs in ragged batches are further from the "
                f"target's distribution than chance allows (TV >= {radius(len(pairs), SUPPORT):.3f}, alpha = 1e-6), "
                f"with {getattr(rule, '__name__', rule)}"
            )
    return rows


def _outputs(
    make_proposer: MakeProposer | None, rule: VerificationRule, requests: Sequence[Request], num_slots: int
) -> list[Generation]:
    """The finished rows in order of the requests; plain decoding without a proposer."""
    proposer = make_proposer(GATE_TARGET, uniforms) if make_proposer else None
    decoder = Decoder(GATE_TARGET, proposer, 3 if proposer else 0, max_batch_size=num_slots, rule=rule, records=False)
    return sorted(decoder.run(requests), key=lambda row: row.request.index)
