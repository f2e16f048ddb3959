"""The verdict of an audit from the findings on its two arms."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.conformance.certificate import ArmFindings, Speculation, Verdict
from specdec.conformance.statistics.betting import (
    draws_needed,
    draws_needed_for_rate,
    min_detectable_rate,
    min_detectable_tv,
    radius,
    radius_when_stopped,
    rate_upper_bound,
)
from specdec.conformance.statistics.instruments import INSTRUMENTS


@dataclass(frozen=True, slots=True)
class AuditLimits:
    """Error rates of an audit and the distance that it must detect.

    Args:
        alpha: maximum probability that a lossless engine is called lossy.
        beta: maximum probability that an engine farther than `max_tv` along the tested direction is called lossless.
        max_tv: total variation distance to detect.
        logit_noise: how much rounding may change a logit difference in the engine; a token farther outside the
            support counts as an error. `divergence.logit_noise` measures it; 1 is far beyond bfloat16's.

    Raises:
        ValueError: for values out of range.
    """

    alpha: float = 1e-6
    beta: float = 1e-6
    max_tv: float = 0.05
    logit_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "max_tv"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.logit_noise >= 0:
            raise ValueError(f"logit_noise={self.logit_noise} must be >= 0; 0 allows no rounding")


DEFAULT_LIMITS = AuditLimits()


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds on the distance of an engine from the reference, and the power of the audit; see `Findings`."""

    direction: str
    tv_lower_bound: float
    tv_upper_bound: float
    min_detectable_tv: float
    num_draws_needed: int


def bounds(arm: ArmFindings, level: float, limits: AuditLimits, max_draws: int = 0) -> Bounds:
    """Bounds for the speculative arm. level: of a single instrument. Trivial without draws.

    max_draws: the most tokens that the audit would have taken, so that they hold whenever it stopped; 0: the number of
        tokens was fixed in advance.
    """
    num_draws = max(1, arm.num_draws)
    if not arm.shifts and "equality" in arm.p_values:
        most, at_end = max(max_draws, num_draws), num_draws >= max_draws
        width = radius_when_stopped(num_draws, most, level) if max_draws else radius(num_draws, level)
        num_outside = sum(arm.num_outside.values())
        return Bounds(
            direction="equality",  # one-hot: the distance is the rate of other tokens
            tv_lower_bound=max(0.0, num_outside / num_draws - width),
            tv_upper_bound=rate_upper_bound(min(num_outside, num_draws), num_draws, level) if at_end else 1.0,
            min_detectable_tv=min_detectable_rate(num_draws, limits.beta),
            num_draws_needed=draws_needed_for_rate(limits.max_tv, limits.beta),
        )
    direction = "draft" if "draft" in arm.p_values else "lookup"
    spans = {name: INSTRUMENTS[name].span for name in arm.shifts}
    distances = [max(shift.low, -shift.high) / spans[name] for name, shift in arm.shifts.items()]
    along = arm.shifts.get(direction)
    return Bounds(
        direction=direction,
        tv_lower_bound=max(0.0, *distances) if distances else 0.0,
        tv_upper_bound=min(1.0, max(-along.low, along.high) / spans[direction]) if along else 1.0,
        min_detectable_tv=min(1.0, min_detectable_tv(num_draws, level, limits.beta)),
        num_draws_needed=draws_needed(limits.max_tv, level, limits.beta),
    )


def judge(
    speculative: ArmFindings,
    control: ArmFindings,
    arms_p_value: float,
    num_draws_needed: int,
    limits: AuditLimits,
    speculation: Speculation | None,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and its reasons. speculation: the speculative arm's counts, None if the engine does not count."""
    differ = arms_p_value <= limits.alpha
    wrong, plain_wrong = (_faults(arm, limits.alpha) for arm in (speculative, control))
    if wrong and (differ or (speculative.errors and not control.errors)):
        return "lossy", (*wrong, *_comparison(differ))
    if wrong and plain_wrong:
        return "inconclusive", (
            *wrong,
            "the engine without speculation is wrong in the same way: its arithmetic, sampling parameters or weights "
            "differ from the reference's, so speculation is not to blame; make them equal",
        )
    if wrong:
        return "inconclusive", (
            *wrong,
            "no fault was found without speculation, but the two arms are not far enough apart to blame speculation; "
            "audit with more draws",
        )
    if plain_wrong:
        return "inconclusive", ("only the engine without speculation is wrong", *plain_wrong)
    if differ:
        return "inconclusive", (
            f"the engine with and without speculation differ (p = {arms_p_value:.2g}), but neither was found to "
            "differ from the reference; audit with more draws",
        )
    return _silent(min(speculative.num_draws, control.num_draws), num_draws_needed, limits, speculation)


def _silent(
    num_draws: int, num_draws_needed: int, limits: AuditLimits, speculation: Speculation | None
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict if nothing was found: was there speculation, and enough data to find a fault?"""
    missing = unconfirmed(speculation)
    if num_draws < num_draws_needed:
        missing = (
            *missing,
            f"num_draws={num_draws} must be at least {num_draws_needed} to detect a distance of "
            f"max_tv={limits.max_tv:g}; use more prompts or draws",
        )
    if missing:
        return "inconclusive", missing
    return "lossless", (f"no fault in {num_draws} tokens, which would have revealed a distance of {limits.max_tv:g}",)


def unconfirmed(speculation: Speculation | None) -> tuple[str, ...]:
    """Reasons to doubt that the engine speculated at all: plain decoding is trivially lossless."""
    if speculation is None:
        return ("speculation not confirmed: the engine does not count num_drafted and num_accepted; add the counters",)
    if speculation.problem:
        return (f"speculation not confirmed: {speculation.problem}",)
    if speculation.num_drafted == 0:
        return ("speculation not confirmed: no token was drafted; check that it is enabled",)
    if speculation.num_accepted == 0:
        return (
            f"speculation not confirmed: none of {speculation.num_drafted} draft tokens was accepted; "
            "check the draft, or use more prompts",
        )
    return ()


def _faults(arm: ArmFindings, alpha: float) -> tuple[str, ...]:
    """Messages on what an arm did wrong."""
    found = {name: p for name, p in arm.p_values.items() if p > 0 and p * _num_tests(arm) <= alpha}
    return (
        *arm.errors,
        *(f"{name} finds a deviation from the reference's distributions (p = {p:.2g})" for name, p in found.items()),
    )


def _num_tests(arm: ArmFindings) -> int:
    """Number of tests: the instruments and the test for repeated outputs. The support check has no false alarms."""
    return len(arm.shifts) + 1


def _comparison(differ: bool) -> tuple[str, ...]:
    return (
        ("the engine without speculation has a different distribution",)
        if differ
        else ("the engine without speculation does not do this",)
    )
