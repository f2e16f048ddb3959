"""Audits of an engine from what it emits: lossless, lossy, or not enough to tell.

An engine is two methods: the same prompts and seeds, with speculation and without. Both arms are judged against the
target's exact laws, and against each other. So that arithmetic in half precision is not mistaken for a bug in
speculation, an engine is called lossy only if the speculative arm is wrong *and* differs from the plain one; and so
that silence is not mistaken for proof, it is called lossless only if a distance of `max_tv` would have been seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.conformance.arms import Arm
from specdec.conformance.betting import Exchangeability
from specdec.conformance.certificate import Findings
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.verdicts import Limits, judge


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


def audit(
    engine: AuditedEngine,
    reference: Reference,
    prompts: Sequence[Tokens],
    *,
    draft: Reference | None = None,
    num_draws: int = 20_000,
    batch_size: int = 8,
    seed: int = 0,
    limits: Limits = Limits(),
) -> Findings:
    """Judge an engine by `num_draws` tokens of each arm.

    reference: the target and the sampling parameters, `max_tokens` and stop tokens included; temperature 0 is judged by
        equality. prompts: token ids, taken in turn as often as needed, but once only if decoding is greedy.
    draft: the laws that the draft is thought to be drawn from, for the test that is directed at it.
    batch_size: prompts that an engine is given at a time. seed: of the audit; requests of all arms get seeds of their
        own, from seed * 2**20 on.
    Raises ValueError if the vocabularies differ, or if there are no prompts.
    """
    _check(engine, reference, draft, prompts)
    ...
