"""What findings amount to, by findings made by hand: two hundred audits cannot see an error of a factor of seven."""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
from helpers.audited import PROMPTS, ToyEngine

from specdec import SamplingParams
from specdec.conformance.audit import SEED_STRIDE, audit
from specdec.conformance.certificate import ArmFindings, Speculation
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import (
    ConfidenceInterval,
    draws_needed,
    draws_needed_for_rate,
    min_detectable_rate,
    min_detectable_tv,
    radius,
    radius_when_stopped,
    rate_upper_bound,
)
from specdec.conformance.statistics.instruments import INSTRUMENTS
from specdec.conformance.verdicts import AuditLimits, Bounds, bounds, judge

NAMES = ("pit_rank", "pit_id", "serial", "surprise", "lookup", "repeat", "draft")
LIMITS, NEEDED = AuditLimits(), 1000
SPECULATES = Speculation(100, 50)
SOUND = ArmFindings(
    p_values=dict.fromkeys(NAMES, 0.5) | {"support": 1.0},
    p_value=1.0,
    found_after=dict.fromkeys(NAMES),
    shifts=dict.fromkeys(NAMES, ConfidenceInterval(0.0, -0.1, 0.1)),
    surprise_z=0.0,
    num_draws=NEEDED,
    num_outputs=10,
    seeds=(0, 9),
    num_outside={"by rounding": 0, "by more": 0},
    largest_gap=0.0,
    errors=(),
)


def wrong(p_value: float) -> ArmFindings:
    return replace(SOUND, p_values=SOUND.p_values | {"serial": p_value})


def verdict(audited: ArmFindings = SOUND, plain: ArmFindings = SOUND, arms: float = 1.0, **changes: object) -> str:
    speculation = changes.get("speculation", SPECULATES)
    return judge(audited, plain, arms, NEEDED, LIMITS, speculation)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("num_draws", [NEEDED, NEEDED + 1])
def test_sound_findings_are_lossless(num_draws: int) -> None:
    arm = replace(SOUND, num_draws=num_draws)
    assert verdict(arm, arm) == "lossless"


@pytest.mark.parametrize(("p_value", "expected"), [(1.2e-7, "lossy"), (1.3e-7, "inconclusive")])
def test_a_p_value_is_corrected_for_the_number_of_tests(p_value: float, expected: str) -> None:
    """Seven instruments and the search for repeats share a false-alarm rate of 1e-6."""
    assert verdict(wrong(p_value), arms=1e-6) == expected


def test_a_corrected_p_value_of_alpha_is_a_fault() -> None:
    limits = AuditLimits(alpha=8 * 2.0**-20)
    assert judge(wrong(2.0**-20), SOUND, limits.alpha, NEEDED, limits, SPECULATES)[0] == "lossy"


@pytest.mark.parametrize(("arms", "expected"), [(1e-6, "lossy"), (1.1e-6, "inconclusive")])
def test_a_wrong_arm_is_lossy_only_if_it_differs_from_the_plain_one(arms: float, expected: str) -> None:
    assert verdict(wrong(1e-20), arms=arms) == expected
    assert verdict(wrong(1e-20), wrong(1e-20), arms=arms) == expected
    assert verdict(SOUND, wrong(1e-20), arms=arms) == "inconclusive"
    assert verdict(arms=arms) == ("inconclusive" if expected == "lossy" else "lossless")


def test_errors_of_one_arm_alone_are_lossy() -> None:
    broken = replace(SOUND, errors=("output of prompt 0 is too long",))
    assert verdict(broken) == "lossy"
    assert verdict(broken, broken) == "inconclusive"


@pytest.mark.parametrize("short", ["speculative", "control"])
def test_each_arm_needs_its_draws(short: str) -> None:
    few = replace(SOUND, num_draws=NEEDED - 1)
    assert verdict(*((few, SOUND) if short == "speculative" else (SOUND, few))) == "inconclusive"


@pytest.mark.parametrize("speculation", [None, Speculation(0, 0), Speculation(100, 0)])
def test_no_speculation_is_not_lossless_but_may_be_lossy(speculation: Speculation | None) -> None:
    assert verdict(speculation=speculation) == "inconclusive"
    assert verdict(wrong(1e-20), arms=1e-20, speculation=speculation) == "lossy"


def reasons(
    audited: ArmFindings = SOUND,
    plain: ArmFindings = SOUND,
    arms: float = 1.0,
    speculation: Speculation | None = SPECULATES,
    limits: AuditLimits = LIMITS,
) -> tuple[str, ...]:
    return judge(audited, plain, arms, NEEDED, limits, speculation)[1]


def test_a_lossless_verdict_is_printed_with_its_bound() -> None:
    assert reasons() == ("no fault in 1000 tokens, which would have revealed a distance of 0.05",)


def test_a_fault_is_named_and_compared_with_the_other_arm() -> None:
    found = "serial finds a deviation from the reference's distributions (p = 1e-20)"
    assert reasons(wrong(1e-20), arms=1e-20) == (found, "the engine without speculation has a different distribution")
    broken = replace(SOUND, errors=("output 3 is too long",))
    assert reasons(broken) == ("output 3 is too long", "the engine without speculation does not do this")
    assert reasons(wrong(1e-20), wrong(1e-20))[0] == found
    assert "speculation is not to blame" in reasons(wrong(1e-20), wrong(1e-20))[1]
    assert "not far enough apart" in reasons(wrong(1e-20))[1]
    assert reasons(SOUND, wrong(1e-20)) == ("only the engine without speculation is wrong", found)
    assert reasons(arms=1e-7) == (
        "the engine with and without speculation differ (p = 1e-07), but neither was found to differ from the "
        "reference; audit with more draws",
    )


def test_every_reason_against_lossless_is_given() -> None:
    few = replace(SOUND, num_draws=NEEDED - 1)
    missing = "num_draws=999 must be at least 1000 to detect a distance of max_tv=0.1; use more prompts or draws"
    limits = AuditLimits(max_tv=0.1)
    assert reasons(few, limits=limits) == (missing,)
    for speculation, text in (
        (None, "the engine does not count num_drafted and num_accepted"),
        (Speculation(0, 0), "no token was drafted"),
        (Speculation(100, 0), "none of 100 draft tokens was accepted"),
    ):
        first, second = reasons(few, speculation=speculation, limits=limits)
        assert first.startswith(f"speculation not confirmed: {text}")
        assert second == missing
    assert verdict(speculation=Speculation(1, 1)) == "lossless"


def test_an_impossible_p_value_of_0_is_left_to_the_errors() -> None:
    """The support check has p-value 0 at a fault, which is among the errors already."""
    unsupported = replace(SOUND, p_values=SOUND.p_values | {"support": 0.0})
    assert verdict(unsupported) == "lossless"


def test_default_limits() -> None:
    assert astuple(AuditLimits()) == (1e-6, 1e-6, 0.05, 1.0)
    assert AuditLimits(logit_noise=0.0).logit_noise == 0


# -- bounds by hand --------------------------------------------------------------------------------------------

OTHER = AuditLimits(alpha=1e-4, beta=1e-3, max_tv=0.1)


def test_bounds_along_the_draft() -> None:
    """Lower bound: the farthest of all instruments from 0; upper bound: along the draft. Both per span."""
    shifts = SOUND.shifts | {
        "draft": ConfidenceInterval(0.2, 0.1, 0.3),
        "serial": ConfidenceInterval(-0.5, -0.6, -0.4),
    }
    found = bounds(replace(SOUND, shifts=shifts), 1e-5, OTHER)
    low = max(0.1 / INSTRUMENTS["draft"].span, 0.4 / INSTRUMENTS["serial"].span)
    power = min_detectable_tv(1000, 1e-5, 1e-3), draws_needed(0.1, 1e-5, 1e-3)
    assert found == Bounds("draft", low, 0.3 / INSTRUMENTS["draft"].span, *power)
    opposite = SOUND.shifts | {"draft": ConfidenceInterval(-0.2, -0.3, -0.1)}
    assert bounds(replace(SOUND, shifts=opposite), 1e-5, OTHER) == Bounds(
        "draft", 0.1 / INSTRUMENTS["draft"].span, 0.3 / INSTRUMENTS["draft"].span, *power
    )


def test_without_a_draft_the_direction_is_that_of_lookup() -> None:
    names = [name for name in NAMES if name != "draft"]
    arm = replace(SOUND, p_values=dict.fromkeys(names, 0.5), shifts={name: SOUND.shifts[name] for name in names})
    found = bounds(arm, 1e-5, OTHER)
    assert (found.direction, found.tv_lower_bound) == ("lookup", 0.0)
    assert found.tv_upper_bound == 0.1 / INSTRUMENTS["lookup"].span


@pytest.mark.parametrize("num_draws", [0, 1])
def test_bounds_of_hardly_any_draws_are_trivial(num_draws: int) -> None:
    arm = replace(SOUND, num_draws=num_draws, shifts={})
    assert astuple(bounds(arm, 1e-5, OTHER))[:4] == ("draft", 0.0, 1.0, 1.0)
    wide = replace(SOUND, shifts={"draft": ConfidenceInterval(0.0, -9.0, 9.0)})
    assert bounds(wide, 1e-5, OTHER).tv_upper_bound == 1


def test_greedy_bounds_are_those_of_a_rate() -> None:
    """One-hot distributions: the distance is the rate of other tokens."""
    greedy = replace(SOUND, p_values={"equality": 0.0}, shifts={}, num_draws=1000)
    arm = replace(greedy, num_outside={"by rounding": 100, "by more": 200})
    found = bounds(arm, 1e-5, OTHER)
    assert found.direction == "equality"
    assert found.tv_lower_bound == 0.3 - radius(1000, 1e-5)
    assert found.tv_upper_bound == rate_upper_bound(300, 1000, 1e-5)
    assert found.min_detectable_tv == min_detectable_rate(1000, 1e-3)
    assert found.num_draws_needed == draws_needed_for_rate(0.1, 1e-3)
    assert bounds(greedy, 1e-5, OTHER).tv_lower_bound == 0
    for hardly_any in (0, 1):
        found = bounds(replace(arm, num_draws=hardly_any), 1e-5, OTHER)
        assert (found.tv_upper_bound, found.min_detectable_tv) == (1, min_detectable_rate(1, 1e-3))
    sampled = replace(SOUND, p_values=SOUND.p_values | {"equality": 0.5})
    assert bounds(sampled, 1e-5, OTHER).direction == "draft"


def test_greedy_bounds_hold_whenever_an_audit_stops() -> None:
    """Of 400 tokens at the most: what stops earlier has a wider lower bound and no upper one."""
    greedy = replace(SOUND, p_values={"equality": 0.0}, shifts={}, num_outside={"by rounding": 100, "by more": 200})
    for num_draws, upper in (
        (399, 1.0),
        (400, rate_upper_bound(300, 400, 1e-5)),
        (401, rate_upper_bound(300, 401, 1e-5)),
    ):
        found = bounds(replace(greedy, num_draws=num_draws), 1e-5, OTHER, 400)
        assert found.tv_upper_bound == upper
        width = radius_when_stopped(num_draws, max(400, num_draws), 1e-5)
        assert found.tv_lower_bound == 300 / num_draws - width


class Noted(ToyEngine):
    """Notes the seeds of each arm's calls."""

    def __init__(self, params: SamplingParams) -> None:
        super().__init__(params)
        self.seeds: dict[str, list[int]] = {"speculative": [], "plain": []}

    def speculative(self, prompts, seeds, max_tokens):
        self.seeds["speculative"] += seeds
        return super().speculative(prompts, seeds, max_tokens)

    def plain(self, prompts, seeds, max_tokens):
        self.seeds["plain"] += seeds
        return super().plain(prompts, seeds, max_tokens)


def test_seeds_of_arms_rounds_and_audits_are_disjoint() -> None:
    """Prompts that do not fill a batch, over several rounds; each audit has a range of seeds to itself."""
    params, seeds = SamplingParams(max_tokens=4), []
    for number in range(3):
        engine = Noted(params)
        audit(engine, Reference(engine.target, params), PROMPTS, num_draws=60, batch_size=5, seed=number)
        assert len(engine.seeds["plain"]) == len(engine.seeds["speculative"]) >= 15
        own = engine.seeds["speculative"] + engine.seeds["plain"]
        assert all(number * SEED_STRIDE <= seed < (number + 1) * SEED_STRIDE for seed in own)
        seeds += own
    assert len(set(seeds)) == len(seeds)
