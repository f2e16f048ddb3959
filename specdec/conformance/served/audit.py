"""Audits a served model: the findings of an ordinary audit, unless the server gives reason to doubt them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from specdec.conformance.arms import Arm
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Findings
from specdec.conformance.reference import Reference, Tokens
from specdec.conformance.served.engine import ServedEngine
from specdec.conformance.served.logprobs import check_logprobs
from specdec.conformance.statistics.contexts import Contexts
from specdec.conformance.verdicts import AuditLimits, bounds
from specdec.servers.errors import EngineError


def audit_served(
    engine: ServedEngine,
    reference: Reference,
    prompts: Sequence[Tokens],
    *,
    num_draws: int,
    batch_size: int,
    seed: int,
    limits: AuditLimits,
) -> Findings:
    """Audit a served engine; arguments as for `audit`, which describes the evidence.

    A server that fails, repeats itself or leaves its tokens uncertain gets no verdict: the findings are inconclusive,
    with the reasons.
    """
    try:
        findings = audit(
            engine, reference, prompts, num_draws=num_draws, batch_size=batch_size, seed=seed, limits=limits
        )
        if reference.sampling.logprobs:
            findings = check_logprobs(findings, reference, (engine.arms[0].reported, engine.arms[1].reported))
        doubts = (*engine.doubts(), *repetitions(engine, reference, limits))
    except EngineError as error:
        return without_evidence(str(error), reference, limits)
    if doubts:
        return replace(findings, verdict="inconclusive", reasons=(*doubts, *findings.reasons))
    return findings


def without_evidence(reason: str, reference: Reference, limits: AuditLimits) -> Findings:
    """The findings of an audit that a server ended: inconclusive, without any token."""
    arms = [Arm(number, reference, None, 1, 0, limits, Contexts()) for number in range(2)]
    speculative, control = (arm.findings() for arm in arms)
    return Findings(
        verdict="inconclusive",
        reasons=(reason,),
        speculative=speculative,
        control=control,
        arms_p_value=1.0,
        **asdict(bounds(speculative, arms[0].level, limits)),
        **asdict(limits),
        sampling=asdict(reference.sampling),
    )


def repetitions(engine: ServedEngine, reference: Reference, limits: AuditLimits) -> Iterator[str]:
    """Outputs that different seeds repeat although that is too unlikely to be chance: the server ignores or caches.

    Among n outputs there are fewer than n^2 / 2 pairs, so that less than alpha of all audits raise a false alarm.
    """
    if reference.sampling.temperature == 0:
        return
    for name, arm in zip(("with speculation", "without speculation"), engine.arms, strict=True):
        repeated = [pair for pair, number in arm.repeats.items() if number > 1]
        threshold = math.log(limits.alpha) - 2 * math.log(max(2, arm.num_outputs))
        unlikely = [log_prob for log_prob in _log_probs(repeated, reference) if log_prob < threshold]
        if unlikely:
            number = arm.repeats.total() - len(arm.repeats)
            yield (
                f"{name}, {number} of {arm.num_outputs} outputs repeat an earlier one of another seed, which had a "
                f"probability of e^{min(unlikely):.0f}; the server must use the seed and not cache replies"
            )


def _log_probs(pairs: Sequence[tuple[Tokens, Tokens]], reference: Reference) -> list[float]:
    """Log-probability of each output under the reference. pairs: prompt and output."""
    sums = [0.0] * len(pairs)
    if not pairs:
        return sums
    for positions in reference.distributions(*map(list, zip(*pairs, strict=True))):
        logs = positions.distribution.prob(positions.tokens).double().clamp(min=torch.finfo(torch.float64).tiny).log()
        for request, log_prob in zip(positions.requests.tolist(), logs.tolist(), strict=True):
            sums[request] += log_prob
    return sums
