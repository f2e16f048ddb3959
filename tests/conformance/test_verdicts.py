"""What findings amount to, by findings made by hand: two hundred audits cannot see an error of a factor of seven."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.audited import PROMPTS, ToyEngine

from specdec import SamplingParams
from specdec.conformance.audit import SEED_STRIDE, audit
from specdec.conformance.certificate import ArmFindings, Speculation
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import ConfidenceInterval
from specdec.conformance.verdicts import AuditLimits, judge

NAMES = ("pit_rank", "pit_id", "serial", "surprise", "lookup", "draft")
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


def test_sound_findings_are_lossless() -> None:
    assert verdict() == "lossless"


@pytest.mark.parametrize(("p_value", "expected"), [(1.4e-7, "lossy"), (1.5e-7, "inconclusive")])
def test_a_p_value_is_corrected_for_the_number_of_tests(p_value: float, expected: str) -> None:
    """Six instruments and the search for repeats share a false-alarm rate of 1e-6."""
    assert verdict(wrong(p_value), arms=1e-6) == expected


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
