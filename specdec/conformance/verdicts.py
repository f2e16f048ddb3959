"""What the findings of two arms amount to."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.conformance.betting import (
    draws_needed,
    draws_needed_for_rate,
    min_detectable_rate,
    min_detectable_tv,
    radius,
    rate_upper_bound,
)
from specdec.conformance.certificate import ArmFindings, Speculation, Verdict
from specdec.conformance.instruments import INSTRUMENTS


@dataclass(frozen=True, slots=True)
class Limits:
    """What an audit may get wrong, and what it must be able to see.

    alpha: probability that a lossless engine is called lossy, at the most. beta: probability that an engine which is
    further away than `max_tv` along the tested direction is called lossless, at the most.
    logit_noise: how far rounding may move the difference of two logits in the engine; a token that misses its
    distribution's support by more is no rounding. `divergence.logit_noise` measures it; 1 is far beyond bfloat16's.
    Raises ValueError for numbers that are none of that.
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


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far the engine may be from the reference, and what would have been seen; see `Findings`."""

    direction: str
    tv_lower_bound: float
    tv_upper_bound: float
    min_detectable_tv: float
    num_draws_needed: int


def bounds(arm: ArmFindings, level: float, limits: Limits) -> Bounds:
    """Of the speculative arm; level: of one of its instruments. Without draws nothing is bounded."""
    num_draws = max(1, arm.num_draws)
    if not arm.shifts and "equality" in arm.p_values:
        num_outside = sum(arm.num_outside.values())
        return Bounds(
            direction="equality",  # the distribution is one token: all distance is in the others
            tv_lower_bound=max(0.0, num_outside / num_draws - radius(num_draws, level)),
            tv_upper_bound=rate_upper_bound(min(num_outside, num_draws), num_draws, level),
            min_detectable_tv=min_detectable_rate(num_draws, limits.beta),
            num_draws_needed=draws_needed_for_rate(limits.max_tv, limits.beta),
        )
    direction = "draft" if "draft" in arm.p_values else "lookup"
    spans = {name: INSTRUMENTS[name].span for name in arm.shifts}
    away = [max(shift.low, -shift.high) / spans[name] for name, shift in arm.shifts.items()]
    along = arm.shifts.get(direction)
    return Bounds(
        direction=direction,
        tv_lower_bound=max(0.0, *away) if away else 0.0,
        tv_upper_bound=min(1.0, max(-along.low, along.high) / spans[direction]) if along else 1.0,
        min_detectable_tv=min(1.0, min_detectable_tv(num_draws, level, limits.beta)),
        num_draws_needed=draws_needed(limits.max_tv, level, limits.beta),
    )


def judge(
    speculative: ArmFindings,
    control: ArmFindings,
    arms_p_value: float,
    num_draws_needed: int,
    limits: Limits,
    speculation: Speculation | None,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and why. speculation: of the speculative arm, None if its engine does not count what it drafts."""
    differ = arms_p_value <= limits.alpha
    wrong, plain_wrong = (_faults(arm, limits.alpha) for arm in (speculative, control))
    if wrong and (differ or (speculative.errors and not control.errors)):
        return "lossy", (*wrong, *_comparison(differ))
    if wrong and plain_wrong:
        return "inconclusive", (
            *wrong,
            "the engine without speculation is wrong in the same way: its arithmetic, its sampling parameters or its "
            "weights are not the reference's, and speculation cannot be blamed; make them the same",
        )
    if wrong:
        return "inconclusive", (
            *wrong,
            "the engine without speculation is not found wrong, but the two are not far enough apart yet to blame "
            "speculation; audit it with more draws",
        )
    if plain_wrong:
        return "inconclusive", ("only the engine without speculation is found wrong", *plain_wrong)
    if differ:
        return "inconclusive", (
            f"the engine with and without speculation differ (p = {arms_p_value:.2g}), though neither is found to "
            "differ from the reference; audit it with more draws",
        )
    return _silent(min(speculative.num_draws, control.num_draws), num_draws_needed, limits, speculation)


def _silent(
    num_draws: int, num_draws_needed: int, limits: Limits, speculation: Speculation | None
) -> tuple[Verdict, tuple[str, ...]]:
    """Where nothing was found: was there speculation to find it in, and enough of it?"""
    missing = _unconfirmed(speculation)
    if num_draws < num_draws_needed:
        missing = (
            *missing,
            f"num_draws={num_draws} must be at least {num_draws_needed} to see a distance of "
            f"max_tv={limits.max_tv:g}; give more prompts or draws",
        )
    if missing:
        return "inconclusive", missing
    return "lossless", (
        f"nothing was found in {num_draws} tokens, which would have shown a distance of {limits.max_tv:g}",
    )


def _unconfirmed(speculation: Speculation | None) -> tuple[str, ...]:
    """Why it is not known that the engine speculated at all: plain decoding under another name is lossless, too."""
    if speculation is None:
        return ("speculation not confirmed: the engine has no num_drafted and num_accepted; let it count them",)
    if speculation.num_drafted == 0:
        return ("speculation not confirmed: no token was drafted; check that it is switched on",)
    if speculation.num_accepted == 0:
        return (
            f"speculation not confirmed: of {speculation.num_drafted} drafted tokens none was accepted; "
            "check the draft, or give it more prompts",
        )
    return ()


def _faults(arm: ArmFindings, alpha: float) -> tuple[str, ...]:
    """What an arm did wrong, in words."""
    found = {name: p for name, p in arm.p_values.items() if p > 0 and p * _num_tests(arm) <= alpha}
    return (
        *arm.errors,
        *(f"{name} finds other distributions than the reference's (p = {p:.2g})" for name, p in found.items()),
    )


def _num_tests(arm: ArmFindings) -> int:
    """Instruments, and one more that looks for outputs that come again; what is impossible raises no false alarm."""
    return len(arm.shifts) + 1


def _comparison(differ: bool) -> tuple[str, ...]:
    return (
        ("the engine without speculation has another distribution",)
        if differ
        else ("the engine without speculation does no such thing",)
    )
