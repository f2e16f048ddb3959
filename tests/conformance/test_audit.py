"""The whole audit on toys: a correct engine is never accused, broken ones are, and nothing is claimed without power."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.audited import DRAFT, PROMPTS, TARGET, ToyEngine, distributions, leaning

from specdec import SamplingParams
from specdec.conformance import mutants
from specdec.conformance.audit import audit
from specdec.conformance.certificate import Findings
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.instruments import INSTRUMENTS
from specdec.conformance.toys import grid_pair
from specdec.conformance.verdicts import AuditLimits
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.verification import Rule, verify_block, verify_tokens

PARAMS = SamplingParams(max_tokens=32)
NUM_RUNS, NUM_DRAWS = 200, 480
ROUGH = AuditLimits(max_tv=0.3)  # what so few draws can see


def run(
    engine: ToyEngine, num_draws: int = 4000, limits: AuditLimits = ROUGH, seed: int = 0, prompts=PROMPTS
) -> Findings:
    rows = 64 if num_draws > 1000 else 16
    sampling = engine.params
    return audit(
        engine,
        Reference(engine.target, sampling, rows),
        prompts,
        draft=Reference(engine.draft, sampling, rows),
        num_draws=num_draws,
        batch_size=rows,
        seed=seed,
        limits=limits,
    )


# -- a correct engine ------------------------------------------------------------------------------------------


@cache
def correct_runs() -> list[Findings]:
    return [run(ToyEngine(PARAMS), NUM_DRAWS, seed=seed) for seed in range(NUM_RUNS)]


@pytest.mark.slow
def test_no_false_alarm_in_200_audits() -> None:
    """Each audit calls a lossless engine lossy with probability at most alpha = 1e-6, so 200 of them at most 2e-4; that
    one is inconclusive, because an arm rejects or the arms differ, has at most three times that."""
    assert [found.verdict for found in correct_runs()] == ["lossless"] * NUM_RUNS
    assert all(not found.speculative.errors for found in correct_runs())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*INSTRUMENTS])
def test_p_values_are_valid(name: str) -> None:
    """P(p <= 0.05) <= 0.05: of 400 at most 45, but with probability 1e-6."""
    arms = [arm for found in correct_runs() for arm in (found.speculative, found.control)]
    assert sum(arm.p_values[name] <= 0.05 for arm in arms) <= 45


@pytest.mark.slow
def test_p_values_of_the_arms_are_valid() -> None:
    """Of 200 at most 28, but with probability 1e-6."""
    assert sum(found.arms_p_value <= 0.05 for found in correct_runs()) <= 28


@pytest.mark.slow
def test_intervals_contain_the_true_value() -> None:
    """Each of an audit's intervals misses zero with probability at most alpha."""
    for found in correct_runs():
        assert found.tv_lower_bound == 0
        assert all(shift.low <= 0 <= shift.high for shift in found.speculative.shifts.values())


@pytest.mark.parametrize(
    "sampling",
    [
        {"top_k": 3},
        {"top_p": 0.8, "temperature": 0.7},
        {"min_p": 0.1, "presence_penalty": 0.5, "logit_bias": {1: -1.0}},
    ],
    ids=str,
)
def test_a_correct_engine_with_processors_is_lossless(sampling: dict) -> None:
    assert run(ToyEngine(replace(PARAMS, **sampling))).verdict == "lossless"


def test_block_verification_is_lossless() -> None:
    assert run(ToyEngine(PARAMS, rule=verify_block)).verdict == "lossless"


@pytest.mark.slow
def test_an_audit_can_be_repeated() -> None:
    assert run(ToyEngine(PARAMS), NUM_DRAWS, seed=3) == correct_runs()[3]
    assert run(ToyEngine(PARAMS), NUM_DRAWS, seed=4).speculative.p_values != correct_runs()[3].speculative.p_values


# -- broken engines --------------------------------------------------------------------------------------------

BROKEN = {
    "M2 recover from the target": {"rule": mutants.recover_from_target},
    "M3 accept always": {"rule": mutants.accept_always},
    "M6 argmax for a draw": {"rule": mutants.argmax_for_draw},
    "M7 wrong accept row": {"rule": mutants.wrong_accept_row},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_engine_is_lossy(name: str) -> None:
    found = run(ToyEngine(PARAMS, **BROKEN[name]), 8000)
    assert found.verdict == "lossy", found.reasons
    assert found.tv_lower_bound > 0
    assert min(filter(None, found.speculative.found_after.values())) < 4000
    assert not any(found.control.found_after.values())


def test_a_uniform_used_twice_is_found() -> None:
    """A certain draft, accepted half of the time, whose residual is a fair coin."""
    target, draft = (MarkovModel((torch.tensor(row).double() / 4).expand(3, 3, 3)) for row in ([1, 1, 2], [0, 0, 4]))
    prompts = [[1, 2], [0], [2, 1]]
    found = run(ToyEngine(PARAMS, target, draft, rule=mutants.reuse_accept_uniform), prompts=prompts)
    assert found.verdict == "lossy"
    assert run(ToyEngine(PARAMS, target, draft), prompts=prompts).verdict == "lossless"


def test_a_distance_of_a_twentieth_is_found_in_20_000_tokens_and_bounded() -> None:
    """Missed with probability at most 1e-6, which the audit states; the bounds hold but with probability 1e-6."""
    wrong = MarkovModel(leaning(TARGET.table, DRAFT.table, 0.05))
    found = run(ToyEngine(PARAMS, speculative_target=wrong), 20_000, AuditLimits())
    assert found.num_draws_needed <= 20_000
    assert found.speculative.p_value <= 1e-6
    assert found.verdict == "lossy"
    assert 0 < found.tv_lower_bound <= 0.05 <= found.tv_upper_bound
    assert found.speculative.num_draws <= 20_000


# -- the control arm -------------------------------------------------------------------------------------------


def test_an_engine_that_is_wrong_without_speculation_too_is_inconclusive() -> None:
    """As low precision is: both arms draw from slightly wrong distributions, and speculation is not to blame."""
    engine = ToyEngine(PARAMS, MarkovModel(leaning(TARGET.table, DRAFT.table, 0.1)))
    found = audit(
        engine,
        Reference(TARGET, PARAMS, 64),
        PROMPTS,
        num_draws=8000,
        batch_size=64,
        draft=Reference(DRAFT, PARAMS, 64),
    )
    assert found.speculative.p_value <= 1e-6
    assert found.verdict == "inconclusive"
    assert "wrong in the same way" in found.reasons[-1]


def test_a_bug_beside_low_precision_is_lossy() -> None:
    engine = ToyEngine(PARAMS, MarkovModel(leaning(TARGET.table, DRAFT.table, 0.1)), rule=mutants.accept_always)
    found = audit(engine, Reference(TARGET, PARAMS, 64), PROMPTS, num_draws=8000, batch_size=64)
    assert found.control.p_value < found.speculative.p_value or found.verdict == "lossy"
    assert found.verdict == "lossy"


def test_an_audit_stops_where_it_is_decided_and_not_before() -> None:
    """Lossy is final, as each of the two p-values that it takes is valid whenever it is looked at."""
    planned, limits = 100_000, AuditLimits()
    found = run(ToyEngine(PARAMS, rule=mutants.accept_always), planned, limits)
    assert found.verdict == "lossy"
    assert found.speculative.num_draws < planned / 10
    first = min(filter(None, found.speculative.found_after.values()))
    assert found.speculative.num_draws >= first
    assert found.arms_p_value <= limits.alpha
    assert 0 < found.tv_lower_bound < 0.7


def test_an_audit_that_stops_has_a_bound_above_0() -> None:
    """The evidence suffices long before the bound does, as a bound by a mean is weaker than the best of many bets."""
    found = run(ToyEngine(PARAMS, rule=mutants.argmax_for_draw), 100_000, AuditLimits())
    first = min(filter(None, found.speculative.found_after.values()))
    assert found.verdict == "lossy"
    assert 2 * first < found.speculative.num_draws < 100_000
    assert found.tv_lower_bound > 0


@pytest.mark.slow
def test_stopping_early_keeps_the_false_alarm_rate() -> None:
    """At a declared 5 % a lossless engine is called lossy in at most 14 of 60 audits that look after every batch, but
    with probability 1e-6 (a binomial bound)."""
    loose = AuditLimits(alpha=0.05, max_tv=0.3)
    verdicts = [run(ToyEngine(PARAMS), NUM_DRAWS, loose, seed=seed).verdict for seed in range(60)]
    assert verdicts.count("lossy") <= 14


def test_a_stopped_audit_is_never_lossless() -> None:
    """What stops it is the verdict lossy or an error; a lossless engine is tested by all of its tokens."""
    found = run(ToyEngine(PARAMS), 640, ROUGH)
    assert found.verdict == "lossless"
    assert found.speculative.num_draws == 640


# -- speculation that does not happen --------------------------------------------------------------------------


class Uncounted:
    """An engine that does not say what it drafts."""

    def __init__(self, engine: ToyEngine) -> None:
        self.speculative, self.plain = engine.speculative, engine.plain


def accept_never(target, draft, accept_uniforms, final_uniforms):
    """Lossless: every draft token is thrown away, and the target draws its own."""
    outcome = verify_tokens(target, draft, torch.ones_like(accept_uniforms) + 1e9, final_uniforms)
    return replace(outcome, next_token=target.at(outcome.accepted).draw(final_uniforms[:, 0]))


def silent(draft, source):
    return mutants.NeverProposes(DraftModelProposer(draft, source))


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (ToyEngine(PARAMS, proposer=silent), "no token was drafted; check that it is enabled"),
        (ToyEngine(PARAMS, rule=Rule(accept_never)), "draft tokens was accepted; check the draft"),
    ],
    ids=["off", "never accepts"],
)
def test_an_engine_that_does_not_speculate_is_not_called_lossless(engine: ToyEngine, reason: str) -> None:
    found = run(engine)
    assert found.verdict == "inconclusive"
    assert found.reasons[0].startswith("speculation not confirmed: ")
    assert reason in found.reasons[0]
    assert found.headline.startswith("inconclusive: speculation not confirmed")
    assert found.num_accepted == 0


def test_without_counts_no_engine_is_called_lossless() -> None:
    params = replace(PARAMS, max_tokens=16)
    engine, reference = ToyEngine(params), Reference(TARGET, params, 64)
    found = audit(Uncounted(engine), reference, PROMPTS, num_draws=1000, batch_size=64, limits=ROUGH)
    assert found.verdict == "inconclusive"
    assert found.headline == (
        "inconclusive: speculation not confirmed: the engine does not count num_drafted and num_accepted; "
        "add the counters"
    )
    assert (found.num_drafted, found.num_accepted) == (None, None)
    again = audit(engine, reference, PROMPTS, num_draws=1000, batch_size=64, limits=ROUGH)
    assert again.headline == "lossless (TV < 0.3)"
    assert again.num_drafted > again.num_accepted > 0


def test_both_reasons_are_given_if_draws_are_missing_too() -> None:
    found = run(ToyEngine(PARAMS, proposer=silent), 300, AuditLimits())
    assert [reason.split(" must")[0] for reason in found.reasons[1:]] == ["num_draws=300"]


class Miscounts(Uncounted):
    """A lossless engine whose counters take these values, one pair after each batch of prompts."""

    def __init__(self, engine: ToyEngine, counts: list[tuple]) -> None:
        super().__init__(engine)
        self.counts, self.run = iter(counts), engine.speculative
        self.num_drafted, self.num_accepted = next(self.counts)
        self.speculative = self.counting

    def counting(self, *arguments):
        self.num_drafted, self.num_accepted = next(self.counts)
        return self.run(*arguments)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ([(5, 5), (99, 40), (60, 50), (200, 90)], "num_drafted must never decrease, but fell from 99 to 60"),
        ([(5, 5), (99, 40), (120, 4), (200, 90)], "num_accepted must never decrease, but fell from 40 to 4"),
        ([(0, 0), (10, 11), (20, 22), (30, 33)], "num_accepted=33 must not exceed num_drafted=30"),
        ([(0, 0), (10, 5), (None, 8), (30, 15)], "must be known throughout an audit, but were missing in a part of it"),
        ([(0, 0), (10, 5), (20, 8), (30, None)], "must be known throughout an audit, but were missing in a part of it"),
        (
            [(None, None), (10, 5), (20, 8), (30, 9)],
            "must be known throughout an audit, but were missing in a part of it",
        ),
        ([(0, 0), (10, 5), (float("nan"), 8), (30, 9)], "num_drafted=nan and num_accepted=8 must be whole numbers"),
        ([(-1, 0), (10, 5), (20, 8), (30, 9)], "num_drafted=-1 and num_accepted=0 must be whole numbers"),
        ([(7, 3), (7, 3), (7, 3), (7, 3)], "no token was drafted; check that it is enabled"),
        ([(7, 3), (17, 3), (27, 3), (37, 3)], "none of 30 draft tokens was accepted"),
    ],
    ids=str,
)
def test_counters_that_contradict_themselves_confirm_nothing(counts: list[tuple], reason: str) -> None:
    """Three batches of 64 prompts; the engine itself is lossless."""
    params = replace(PARAMS, max_tokens=8)
    engine = Miscounts(ToyEngine(params), counts)
    found = audit(engine, Reference(TARGET, params, 64), PROMPTS, num_draws=3 * 512, batch_size=64, limits=ROUGH)
    assert found.verdict == "inconclusive"
    assert found.reasons[0].startswith("speculation not confirmed: ")
    assert reason in found.reasons[0]
    believed = "drafted; check" in reason or "was accepted" in reason
    assert (found.num_drafted is None) == (not believed)


def test_only_drafts_of_the_audit_are_counted() -> None:
    params = replace(PARAMS, max_tokens=8)
    counts = [(100, 90), (110, 95), (120, 98), (130, 101)]
    engine = Miscounts(ToyEngine(params), counts)
    found = audit(engine, Reference(TARGET, params, 64), PROMPTS, num_draws=3 * 512, batch_size=64, limits=ROUGH)
    assert (found.verdict, found.num_drafted, found.num_accepted) == ("lossless", 30, 11)


# -- power -----------------------------------------------------------------------------------------------------


def test_too_few_draws_give_no_verdict_and_say_how_many_it_takes() -> None:
    found = run(ToyEngine(PARAMS), 300, AuditLimits())
    assert found.verdict == "inconclusive"
    needed = found.num_draws_needed
    assert found.reasons == (
        f"num_draws=300 must be at least {needed} to detect a distance of max_tv=0.05; use more prompts or draws",
    )
    assert needed == 14_270  # eight tests share alpha
    assert found.min_detectable_tv > 0.05


@pytest.mark.parametrize("name", ["alpha", "beta", "max_tv"])
@pytest.mark.parametrize("value", [-0.5, 0.0, 1.0, 1.5])
def test_limits_are_probabilities(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} must lie between 0 and 1"):
        AuditLimits(**{name: value})


def test_noise_is_not_negative() -> None:
    with pytest.raises(ValueError, match="logit_noise=-1 must be >= 0; 0 allows no rounding"):
        AuditLimits(logit_noise=-1)


# -- greedy decoding -------------------------------------------------------------------------------------------

GREEDY = SamplingParams(temperature=0, max_tokens=16)
MANY_PROMPTS = [[a, b] for a in range(8) for b in range(8)]


def test_greedy_is_judged_by_equality() -> None:
    found = run(ToyEngine(GREEDY), prompts=MANY_PROMPTS, limits=AuditLimits())
    assert found.verdict == "lossless"
    assert found.direction == "equality"
    assert found.speculative.num_draws == 64 * 16  # each prompt once
    assert found.speculative.p_values == {"equality": 1.0}
    assert found.tv_upper_bound == pytest.approx(1 - 1e-6 ** (1 / 1024))


def test_greedy_outputs_that_end_early_are_bounded_too() -> None:
    """All prompts were used: the audit did not stop because of what it had seen."""
    params = replace(GREEDY, stop_token_ids=(0,))
    found = run(ToyEngine(params, stop=frozenset([0])), prompts=MANY_PROMPTS, limits=ROUGH)
    assert found.verdict == "lossless"
    assert found.speculative.num_draws < 64 * 16
    assert found.tv_upper_bound == pytest.approx(1 - 1e-6 ** (1 / found.speculative.num_draws))


def test_greedy_with_too_few_prompts_gives_a_reason() -> None:
    found = run(ToyEngine(GREEDY), limits=AuditLimits())
    assert found.verdict == "inconclusive"
    assert "num_draws=48 must be at least 270" in found.reasons[0]


def test_a_greedy_bug_is_named() -> None:
    found = run(
        ToyEngine(GREEDY, rule=mutants.accept_always, draft=MarkovModel(distributions(9))), prompts=MANY_PROMPTS
    )
    assert found.verdict == "lossy"
    assert "has probability 0 under the reference, " in found.speculative.errors[0]


def test_near_ties_that_rounding_swaps_in_both_arms_are_no_bug() -> None:
    tie = MarkovModel(torch.tensor([0.4, 0.4 - 1e-4, 0.2 + 1e-4], dtype=torch.float64).expand(3, 3, 3))
    swapped = MarkovModel(torch.tensor([0.4 - 1e-4, 0.4, 0.2 + 1e-4], dtype=torch.float64).expand(3, 3, 3))
    prompts = [[a, b] for a in range(3) for b in range(3)] * 3

    def verdict(logit_noise: float) -> Findings:
        return audit(
            ToyEngine(GREEDY, swapped, swapped),
            Reference(tie, GREEDY),
            prompts,
            limits=AuditLimits(logit_noise=logit_noise),
        )

    assert verdict(1e-2).verdict == "lossless"
    assert verdict(1e-2).speculative.num_outside == {"by rounding": 27 * 16, "by more": 0}
    assert verdict(1e-2).speculative.largest_gap == pytest.approx(math.log(0.4 / (0.4 - 1e-4)), rel=1e-6)
    assert verdict(1e-6).verdict == "inconclusive"  # the plain arm does the same


# -- errors that are named at once -----------------------------------------------------------------------------


def test_an_impossible_token_is_named() -> None:
    """Zeros of the target that an engine with top-k on one side emits."""
    target, draft = grid_pair(12)
    params = replace(PARAMS, top_k=1)
    exact = AuditLimits(max_tv=0.3, logit_noise=1e-3)
    found = run(ToyEngine(params, target, draft, decoder=mutants.TopKOnOneSide), prompts=[[1, 2]], limits=exact)
    assert found.verdict == "lossy"
    assert found.speculative.num_draws < 4000  # at once
    assert "output of prompt 0 with seed " in found.speculative.errors[0]
    assert found.speculative.p_values["support"] == 0


def test_a_token_that_the_model_cannot_say_misses_by_infinity() -> None:
    target = MarkovModel(torch.tensor([0.5, 0.5, 0.0]).double().expand(3, 3, 3))
    even = MarkovModel(torch.full((3, 3, 3), 1 / 3).double())
    found = run(ToyEngine(PARAMS, target, even, rule=mutants.accept_always), prompts=[[1, 0]])
    assert found.verdict == "lossy"
    assert "token 2 at position" in found.speculative.errors[0]
    assert "has probability 0 under the reference, whatever its precision" in found.speculative.errors[0]


def test_outputs_that_continue_after_a_stop_token_are_named() -> None:
    params, stop = replace(PARAMS, stop_token_ids=(0,)), frozenset([0])
    assert run(ToyEngine(params, stop=stop)).verdict == "lossless"
    found = run(ToyEngine(params, stop=stop, decoder=mutants.IgnoredStop))
    assert found.verdict == "lossy"
    assert "(stop token 0 at" in found.speculative.errors[0]


def test_outputs_longer_than_max_tokens_are_named() -> None:
    found = run(ToyEngine(PARAMS, decoder=mutants.OverlongDraft))
    assert found.verdict == "lossy"
    assert "must end after 32 (max_tokens=32)" in found.speculative.errors[0]


class Stops(ToyEngine):
    """Both arms end one token early, as an engine that was given other limits does."""

    def speculative(self, prompts, seeds, max_tokens):
        return super().speculative(prompts, seeds, max_tokens - 1)

    def plain(self, prompts, seeds, max_tokens):
        return super().plain(prompts, seeds, max_tokens - 1)


def test_ends_that_are_wrong_in_both_arms_are_not_speculations() -> None:
    found = run(Stops(PARAMS))
    assert found.verdict == "inconclusive"
    assert "has 31 tokens but must end after 32 (max_tokens=32)" in found.speculative.errors[0]


class OneSeed(ToyEngine):
    """Gives every request the same random stream."""

    def speculative(self, prompts, seeds, max_tokens):
        return super().speculative(prompts, [7] * len(seeds), max_tokens)


def test_a_seed_that_is_ignored_is_named() -> None:
    found = run(OneSeed(PARAMS))
    assert found.verdict == "lossy"
    assert "must give independent outputs" in found.speculative.errors[0]


class Empty(ToyEngine):
    def speculative(self, prompts, seeds, max_tokens):
        return [[] for _ in prompts]


def test_an_empty_output_is_named() -> None:
    found = run(Empty(PARAMS))
    assert found.verdict == "lossy"
    assert "has 0 tokens but must end after 32" in found.speculative.errors[0]


class Silent(ToyEngine):
    def speculative(self, prompts, seeds, max_tokens):
        return []


def test_input_that_makes_no_audit_is_refused() -> None:
    small = grid_pair(1)[0]
    with pytest.raises(ValueError, match=r"token \d at position 0 must be below the reference's vocabulary of 3"):
        audit(ToyEngine(PARAMS, MarkovModel(distributions(3).flip(-1))), Reference(small, PARAMS), [[1]])
    with pytest.raises(ValueError, match=r"the draft's vocabulary of 3 tokens must equal the reference's, 8; audit"):
        audit(ToyEngine(PARAMS), Reference(TARGET, PARAMS), PROMPTS, draft=Reference(small, PARAMS))
    named = ToyEngine(PARAMS)
    named.vocab_size = 9
    with pytest.raises(ValueError, match=r"the engine's vocabulary of 9 tokens must equal the reference's, 8; audit"):
        audit(named, Reference(TARGET, PARAMS), PROMPTS)
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        audit(named, Reference(TARGET, PARAMS), [])
    with pytest.raises(ValueError, match="the engine returned 0 outputs but must return one per prompt, 3"):
        audit(Silent(PARAMS), Reference(TARGET, PARAMS), PROMPTS, batch_size=3)


@pytest.mark.slow
def test_an_endless_surprise_is_a_number() -> None:
    assert all(math.isfinite(found.speculative.surprise_z) for found in correct_runs())
    # the sum of squares of 200 standard scores: beyond 330 with probability below 1e-7 if they are near normal
    assert sum(found.speculative.surprise_z**2 for found in correct_runs()) < 330
