"""How a bug is planted: a decoder of which one part is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from specdec.decoding import Decoder
from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.sampling.distributions import Distribution
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.verification import (
    Draft,
    Rule,
    Verification,
    VerificationRule,
    verify_tokens,
)

Maker = Callable[[UniformSource, VerificationRule, int], Decoder]


class Plant(Protocol):
    """Makes decoders of a pair with a planted bug; see `maker`. `MUTANTS` lists them by name."""

    def __call__(self, target: Any, draft: Any, gamma: int, **parts: Any) -> Maker: ...


def maker(
    target: Any,
    draft: Any,
    gamma: int,
    decoder: type[Decoder] = Decoder,
    proposer: Callable[[Any, UniformSource], Proposer] = DraftModelProposer,
    break_target: Callable[[Any], Any] = lambda target: target,
    break_proposer: Callable[[Proposer], Proposer] = lambda proposer: proposer,
    break_rule: Callable[[VerificationRule], VerificationRule] = lambda rule: rule,
    break_uniforms: Callable[[UniformSource], UniformSource] = lambda source: source,
    records: bool | None = None,
) -> Maker:
    """A function that makes decoders of this pair from (uniforms, rule, max_batch_size), with some parts replaced.

    target: a LanguageModel. draft: passed to the proposer together with the uniform source.
    gamma: tokens proposed per step.
    """

    def make(
        source: UniformSource = uniforms, rule: VerificationRule = verify_tokens, max_batch_size: int = 1
    ) -> Decoder:
        source = break_uniforms(source)
        return decoder(
            break_target(target),
            break_proposer(proposer(draft, source)),
            gamma,
            max_batch_size=max_batch_size,
            rule=break_rule(rule),
            uniforms=source,
            records=records,
        )

    return make


def with_rule(broken: VerificationRule) -> Callable[[VerificationRule], VerificationRule]:
    """Replace the rule but still call the original, in case it records its calls."""

    def break_rule(rule: VerificationRule) -> VerificationRule:
        @Rule
        def both(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
            rule(target, draft, accept_uniforms, final_uniforms)
            return broken(target, draft, accept_uniforms, final_uniforms)

        return both

    return break_rule


class BrokenLoop(Decoder):
    """A decoder whose step is composed of replaceable parts."""

    runs_ahead = False
