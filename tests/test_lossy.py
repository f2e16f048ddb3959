"""Lossy rules: each is as lossy as its formula says, by enumeration of the real loop, and is called lossy."""

from __future__ import annotations

import pytest
import torch

from specdec import Engine, SamplingParams
from specdec.conformance.certificate import Certificate, Subject
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.mutants import maker
from specdec.conformance.statistics.lossy_sizes import first_token, kl_divergence
from specdec.conformance.statistics.sizes import total_variation
from specdec.conformance.toys import grid_pair, joint_distribution
from specdec.lossy import LOSSY_RULES, Fly, Threshold, TopK, Typical, lossy_rule
from specdec.verification import verify_tokens

PROMPT = (1, 2)
RULES = [
    Typical(),
    Typical(epsilon=0.3, delta=1.0),
    Threshold(single=0.5),
    Threshold(single=1.0, acc=0.5),
    TopK(k=2, delta=5.0),
    TopK(k=3, delta=0.1),
]
GRID = (4, 4, 12)  # draft and acceptance are quarters; without one token, a target's quarters are thirds


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_first_token_of_a_step_has_the_distribution_of_the_formula(rule) -> None:
    """The first token comes from the prefill, the second is the first of a step; drafted as a third may follow."""
    most = 0.0
    for seed in range(3):
        target, draft = grid_pair(seed)
        distribution = exact_distribution(maker(target, draft, 1), PROMPT, 3, GRID, rule=rule)
        for first in range(3):
            rows = [model.table[2, first].double()[None] for model in (target, draft)]
            mass = [sum(distribution.get((first, second, third), 0.0) for third in range(3)) for second in range(3)]
            if sum(mass):
                formula = first_token(rule, *rows)
                assert formula[0].tolist() == pytest.approx([each / sum(mass) for each in mass], abs=1e-12)
                most = max(most, float(total_variation(formula, rows[0])))
    assert most > 0.05, "the toy does not show that it is lossy"


def test_thresholds_of_one_are_lossless() -> None:
    rule = Threshold(single=1.0, acc=1.0)
    target, draft = grid_pair(1)
    distribution = exact_distribution(maker(target, draft, 1), PROMPT, 4, GRID, rule=rule)
    assert distance(distribution, joint_distribution(target, PROMPT, 4)) < 1e-12


@pytest.mark.parametrize("entropy", [0.5, 100.0])
def test_fly_by_hand(entropy: float) -> None:
    """Two draft tokens and a window of one: a rejected first token stays if the second is accepted after it."""
    rule, (target, draft) = Fly(window=1, entropy=entropy), grid_pair(12)
    distribution = exact_distribution(maker(target, draft, 2), PROMPT, 4, (4, 4, 4, 4, 4), rule=rule)
    for first in range(3):
        p, q = (model.table[2, first].double() for model in (target, draft))
        kept = torch.minimum(p, q)
        next_kept = torch.minimum(target.table[first], draft.table[first]).double().sum(-1)
        is_uncertain = torch.special.entr(p).sum() >= entropy
        deferred = (q - kept) * next_kept * (p > 0) * is_uncertain
        residual = (p - kept) / (p - kept).sum().clamp(min=1e-300)
        expected = kept + deferred + (1 - kept.sum() - deferred.sum()) * residual
        mass = torch.zeros(3).double()
        for tokens, each in distribution.items():
            mass[tokens[1]] += each * (tokens[0] == first)
        if mass.sum():
            assert (mass / mass.sum()).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    is_lossless = distance(distribution, joint_distribution(target, PROMPT, 4)) < 1e-12
    assert is_lossless == (entropy == 100)


def test_fly_defers_nothing_without_a_whole_window() -> None:
    target, draft = grid_pair(12)
    distribution = exact_distribution(maker(target, draft, 1), PROMPT, 4, (4, 4, 4), rule=Fly(window=1))
    assert distance(distribution, joint_distribution(target, PROMPT, 4)) < 1e-12


@pytest.mark.parametrize("name", LOSSY_RULES)
def test_at_temperature_0_each_rule_accepts_what_the_target_chooses(name: str) -> None:
    target, draft = grid_pair(3)
    params = SamplingParams(temperature=0, max_tokens=12)
    plain = Engine(target).generate([PROMPT], params)[0].token_ids
    engine = Engine(target, method="draft_model", draft=draft, verification=f"lossy:{name}")
    assert engine.generate([PROMPT], params)[0].token_ids == plain


@pytest.mark.parametrize("name", LOSSY_RULES)
def test_a_lossy_engine_says_so(name: str) -> None:
    target, draft = grid_pair(3)
    engine = Engine(target, method="draft_model", draft=draft, verification=f"lossy:{name}")
    assert f"verification='lossy:{name}'" in repr(engine)
    (completion,) = engine.generate([PROMPT], SamplingParams(max_tokens=4))
    assert completion.lossy is not None
    assert completion.lossy.startswith(f"lossy:{name}(")
    assert str(lossy_rule(completion.lossy)) == completion.lossy  # the name in full can be given again


def test_what_is_not_lossy_says_nothing() -> None:
    target, draft = grid_pair(3)
    for verification in ("token", "block", "coupled"):
        engine = Engine(target, method="draft_model", draft=draft, verification=verification)
        assert engine.generate([PROMPT], SamplingParams(max_tokens=4))[0].lossy is None
    forced = Engine(target, method="draft_model", draft=draft, forced_acceptance="all")
    assert forced.generate([PROMPT], SamplingParams(max_tokens=4))[0].lossy == "forced_acceptance"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lossy:", "verification='lossy:' must be one of"),
        ("lossy:loose", "verification='lossy:loose' must be one of"),
        ("typical", "verification='typical' must be one of"),
        ("lossy:typical(eps=0.1)", "must name parameters among epsilon, delta, not 'eps'"),
        ("lossy:typical(epsilon=much)", "must give epsilon as float, not 'much'"),
        ("lossy:top_k(k=2.5)", "must give k as int, not '2.5'"),
        ("lossy:threshold(single=0)", "single=0.0 of .* must lie between 1e-09 and 1"),
        ("lossy:typical(epsilon=nan)", "epsilon=nan of .* must lie between 0 and 1"),
    ],
)
def test_unknown_rules_and_parameters_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(grid_pair(0)[0], method="ngram", verification=name)


def test_trees_and_certificates_refuse_lossy_rules() -> None:
    target, draft = grid_pair(3)
    with pytest.raises(ValueError, match="verification='lossy:fly' must be token or coupled with method=\"tree\""):
        Engine(target, method="tree", draft=draft, verification="lossy:fly")
    with pytest.raises(ValueError, match="verification='lossy:fly' must be lossless for a certificate"):
        Certificate.of(Subject(verification="lossy:fly"), None)  # type: ignore[arg-type]


def test_divergence_by_hand() -> None:
    probs, target = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0]])
    assert kl_divergence(probs, target).tolist() == pytest.approx([0.5 * 0.6931471805599453, float("inf")])


def test_a_rule_that_looks_ahead_has_no_formula() -> None:
    with pytest.raises(TypeError, match=r"rule=lossy:fly\(.* must decide by a token's own distributions"):
        first_token(Fly(), torch.ones(1, 2) / 2, torch.ones(1, 2) / 2)
    assert verify_tokens.needs_noise is Fly().needs_noise is False
