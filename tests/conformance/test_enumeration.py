"""The oracle itself, and with it the joint distribution of every rule under every combination of processors."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, partial

import pytest
import torch
from helpers.strategies import distributions
from helpers.toys import Automaton, coupled_pieces, distribution_after, processed_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.conformance import mutants
from specdec.conformance.enumeration import (
    Grid,
    RacePieces,
    ScriptedNoise,
    Tokens,
    coupled_runs,
    exact_coupled_distribution,
    exact_distribution,
    pieces_between,
    race_pieces,
)
from specdec.conformance.gates import distance
from specdec.conformance.mutants import maker, with_rule
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair, joint_distribution, table
from specdec.constraints.bans import AllOf, AtLeast, Without
from specdec.constraints.progress import Constraint
from specdec.decoding import Decoder
from specdec.models.costs import StepCosts
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.sampling.distributions import Dense, race
from specdec.sampling.randomness import Role
from specdec.sampling_params import SamplingParams
from specdec.verification import Rule, verify_block, verify_coupled, verify_tokens

# -- races over pieces ---------------------------------------------------------------------------------------


def frequencies(distribution: Sequence[float], pieces: RacePieces) -> list[Fraction]:
    """How much of the noise lets each token win, by the library's own race."""
    noise = torch.tensor([uniforms for uniforms, _ in pieces], dtype=torch.float64)
    winners = race(torch.tensor(distribution, dtype=torch.float64).expand(len(pieces), -1), noise).tolist()
    won: Counter = Counter()
    for winner, (_, weight) in zip(winners, pieces, strict=True):
        won[winner] += weight
    return [Fraction(won[token]) for token in range(len(distribution))]


@given(st.lists(distributions(3), min_size=1, max_size=4) | st.lists(distributions(2), min_size=1, max_size=4))
def test_races_over_pieces_have_the_distributions_exactly(several: list) -> None:
    """Not to a tolerance: the areas are fractions. This is the exact distribution of one race, by integration."""
    pieces = race_pieces(distribution.tolist() for distribution in several)
    assert sum(weight for _, weight in pieces) == 1
    for distribution in several:
        assert frequencies(distribution.tolist(), pieces) == [
            Fraction(p).limit_denominator(100) for p in distribution.tolist()
        ]


def test_pieces_of_other_distributions_are_not_enough() -> None:
    pieces = race_pieces([[0.5, 0.25, 0.25]])
    assert frequencies([0.1, 0.3, 0.6], pieces) != [Fraction(1, 10), Fraction(3, 10), Fraction(6, 10)]


def test_four_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="distributions over 4 tokens must be over two or three"):
        race_pieces([[0.25] * 4])


def test_noise_is_for_coupled_draws_only() -> None:
    source = ScriptedNoise(torch.rand(1, 1, 3), 0)
    with pytest.raises(ValueError, match="must be 4: all draws are coupled here"):
        source(*(torch.tensor([[x]]) for x in (0, 0, Role.ACCEPT, 0)))


def test_pieces_between_thresholds() -> None:
    assert pieces_between([0.75, 0.0, 0.25, 0.25 + 1e-13, 1.0]) == [(0.125, 0.25), (0.5, 0.5), (0.875, 0.25)]
    assert pieces_between([]) == [(0.5, 1.0)]


# -- the coupled loop: its joint distribution, and the same tokens whatever is proposed --------------------------------

HALVES = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [2, 0, 0]]).double() / 2
TARGET, DRAFT = FeatureTarget(table(0, HALVES)), MarkovModel(table(3, HALVES))
PROMPT = (0, 1, 2, 0)


class WhileSure(AdaptiveLength):
    """Goes on only behind tokens that the draft had no doubt about, so that rows end their drafts apart."""

    def __init__(self) -> None:
        super().__init__(StepCosts((1.0,), 0.0))

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        return [each > 0.6 for each in reach]


def plain(source, draft=None):
    return None


def ngram(source, draft=None):
    return NgramProposer(3, TARGET.device, partial(LookupIndex, 1, 2))


def head(source, draft=DRAFT):
    return EagleProposer(ToyHead(draft), source)


def hybrid(source, draft=DRAFT):
    return HybridProposer(NgramProposer(3, TARGET.device, partial(LookupIndex, 2, 2)), head(source, draft))


def ending_early(source, draft=DRAFT):
    return EagleProposer(ToyHead(draft), source, WhileSure())


def decoder_of(propose, gamma: int, records: bool = False, target=TARGET, draft=DRAFT):
    def make(source, rule, max_batch_size):
        options = {"max_batch_size": max_batch_size, "rule": rule, "uniforms": source, "records": records}
        return Decoder(target, propose(source, draft), gamma if propose is not plain else 0, **options)

    return make


@cache
def plain_runs(stop: tuple[int, ...]) -> list[tuple[Tokens, Fraction]]:
    """Of decoding without speculation, for the noise that matters with a draft."""
    params = SamplingParams(stop_token_ids=stop)
    return coupled_runs(decoder_of(plain, 0), PROMPT, coupled_pieces((TARGET, DRAFT), PROMPT, 4), params)


@pytest.mark.parametrize("stop", [(), (1,)])
@pytest.mark.parametrize(("propose", "gamma"), [(ngram, 2), (head, 1), (head, 3), (ending_early, 3), (hybrid, 2)])
def test_joint_distribution_of_the_coupled_loop(propose, gamma: int, stop: tuple[int, ...]) -> None:
    """Over all noise: the distribution is the target's, and each piece of noise gives what plain decoding does."""
    params = SamplingParams(stop_token_ids=stop)
    runs = coupled_runs(decoder_of(propose, gamma), PROMPT, coupled_pieces((TARGET, DRAFT), PROMPT, 4), params)
    assert runs == plain_runs(stop)
    assert distance(exact_coupled_distribution(runs), processed_distribution(TARGET, params, PROMPT, 4)) < 1e-12


def test_joint_distribution_of_the_recorded_coupled_loop() -> None:
    runs = coupled_runs(decoder_of(head, 2, records=True), PROMPT, coupled_pieces((TARGET, DRAFT), PROMPT, 4))
    assert distance(exact_coupled_distribution(runs), joint_distribution(TARGET, PROMPT, 4)) < 1e-12


def test_joint_distribution_of_coupled_quarters() -> None:
    """Distributions that share no token's probability, with a draft model."""
    target, draft = grid_pair(12)
    runs = coupled_runs(maker(target, draft, 2), (1, 2), coupled_pieces((target, draft), (1, 2), 3))
    assert distance(exact_coupled_distribution(runs), joint_distribution(target, (1, 2), 3)) < 1e-12


def wrong_row(target, draft, accept_uniforms, final_uniforms):
    """Draft token i is compared with what the target draws at position i + 1."""
    shifted = Dense(target.dense().roll(-1, 1)) if draft.tokens.shape[1] else target
    return verify_coupled(shifted, draft, accept_uniforms, final_uniforms)


def keep_the_draft(target, draft, accept_uniforms, final_uniforms):
    """Emits the draft's token where it differs from the target's."""
    right = verify_coupled(target, draft, accept_uniforms, final_uniforms)
    if not draft.tokens.shape[1]:
        return right
    drafted = draft.tokens.gather(1, right.accepted.clamp(max=draft.tokens.shape[1] - 1).unsqueeze(1)).squeeze(1)
    next_token = torch.where(right.accepted < draft.num_proposed, drafted, right.next_token)
    return type(right)(right.accepted, next_token)


@pytest.mark.parametrize("broken", [wrong_row, keep_the_draft])
def test_the_oracle_sees_broken_coupled_rules(broken) -> None:
    pieces = coupled_pieces((TARGET, DRAFT), PROMPT, 4)
    runs = coupled_runs(decoder_of(head, 2), PROMPT, pieces, rule=Rule(broken, needs_noise=True))
    assert distance(exact_coupled_distribution(runs), joint_distribution(TARGET, PROMPT, 4)) > 0.01


def test_the_oracle_sees_noise_shared_between_positions() -> None:
    def shared(source):
        return lambda seeds, positions, *key: source(seeds, torch.full_like(positions, len(PROMPT)), *key)

    make = maker(TARGET, DRAFT, 2, break_uniforms=shared)
    runs = coupled_runs(make, PROMPT, [race_pieces(HALVES.tolist())] * 4)
    assert distance(exact_coupled_distribution(runs), joint_distribution(TARGET, PROMPT, 4)) > 0.1


# -- every combination of processors, crossing a step boundary and a stop token -------------------------------

# with weights and factors of two all distributions are fractions, and no threshold of top-p or min-p lies near a sum
# or a ratio
PROCESSORS = {
    "temperature": {"temperature": 0.5},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.77},
    "min_p": {"min_p": 0.3},
    "penalties": {"presence_penalty": math.log(2), "frequency_penalty": math.log(2)},
    "logit_bias": {"logit_bias": {0: math.log(2)}},
}
COMBINATIONS = [names for size in range(len(PROCESSORS) + 1) for names in itertools.combinations(PROCESSORS, size)]
# a factor that squares probabilities, whose fractions soon become too fine to go into all combinations
PROCESSORS["repetition"] = {"repetition_penalty": 2.0}
SQUARED = [("repetition",), ("repetition", "top_k")]


def with_processors(names: Sequence[str], **others) -> SamplingParams:
    options = {name: value for each in names for name, value in PROCESSORS[each].items()}
    return SamplingParams(**options, **others)


def model(weights: Sequence[Sequence[int]]) -> MarkovModel:
    """A table over three (or two) tokens whose rows take turns."""
    rows = torch.tensor(weights).double()
    vocab_size = rows.shape[1]
    index = torch.arange(vocab_size**2) % len(rows)
    return MarkovModel((rows / rows.sum(1, keepdim=True))[index].view(vocab_size, vocab_size, vocab_size))


def token_grid(
    target: MarkovModel,
    draft: MarkovModel,
    params: SamplingParams,
    prompt: Tokens,
    output: Tokens,
    constraints: tuple[Automaton | None, Automaton | None] = (None, None),
) -> Grid:
    """The thresholds of a step that drafts one token, for token as for block verification, from the definitions.

    constraints: the target's and the draft's.
    """
    p, q = (
        distribution_after(each, params, prompt, output, constraint)
        for each, constraint in zip((target, draft), constraints, strict=True)
    )
    after = [distribution_after(target, params, prompt, (*output, token), constraints[0]) for token in range(len(p))]
    excess = [max(a - b, 0) for a, b in zip(p, q, strict=True)]
    residual = [each / (sum(excess) or 1) for each in excess]
    last = [edge for distribution in (p, residual, *after) for edge in itertools.accumulate(distribution)]
    ratios = [a / b for a, b in zip(p, q, strict=True) if b]
    return pieces_between(itertools.accumulate(q)), pieces_between(ratios), pieces_between(last)


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@pytest.mark.parametrize("names", COMBINATIONS + SQUARED, ids="+".join)
def test_joint_distribution_under_processors(names: tuple[str, ...], rule) -> None:
    """Four tokens: a prefill and two steps or more, token 2 being a stop token."""
    target, draft = model([[1, 2, 1], [4, 1, 1], [1, 1, 2]]), model([[1, 1, 1], [2, 1, 1], [1, 4, 1], [1, 2, 4]])
    params, prompt = with_processors(names, stop_token_ids=(2,)), (1, 0)
    grid = partial(token_grid, target, draft, params, prompt)
    distribution = exact_distribution(maker(target, draft, 1), prompt, 4, grid, params, rule)
    assert distance(distribution, processed_distribution(target, params, prompt, 4)) < 1e-12


@pytest.mark.parametrize("names", COMBINATIONS + SQUARED, ids="+".join)
def test_coupled_joint_distribution_under_processors(names: tuple[str, ...]) -> None:
    """Two tokens, the pieces of whose races are few; and the tokens of each piece are those without speculation."""
    target, draft = model([[1, 2], [4, 1], [1, 1]]), model([[1, 1], [2, 1], [1, 4], [1, 2]])
    params, prompt, num_tokens = with_processors(names), (1, 0), 3
    pieces = coupled_pieces((target, draft), prompt, num_tokens, params)
    runs = coupled_runs(maker(target, draft, 2), prompt, pieces, params)
    assert runs == coupled_runs(decoder_of(plain, 0, target=target), prompt, pieces, params)
    assert (
        distance(exact_coupled_distribution(runs), processed_distribution(target, params, prompt, num_tokens)) < 1e-12
    )


weights = st.lists(st.integers(1, 4), min_size=3, max_size=3) | st.permutations([0, 1, 3])
tables = st.lists(weights, min_size=1, max_size=9).map(model)


@settings(max_examples=25)
@given(
    tables, tables, st.lists(st.sampled_from(list(PROCESSORS)), unique=True, max_size=3), st.sampled_from([(), (1,)])
)
def test_joint_distribution_of_any_pair(target: MarkovModel, draft: MarkovModel, names: set[str], stop: tuple) -> None:
    """Hypothesis searches tables, processors and stop tokens: three tokens of token and of block verification."""
    params, prompt = with_processors(sorted(names), stop_token_ids=stop), (1, 0)
    grid = partial(token_grid, target, draft, params, prompt)
    for rule in (verify_tokens, verify_block):
        distribution = exact_distribution(maker(target, draft, 1), prompt, 3, grid, params, rule)
        assert distance(distribution, processed_distribution(target, params, prompt, 3)) < 1e-12


def test_logits_processors_on_one_side_only_are_detected() -> None:
    """A target that penalises what the draft does not: the grid is fine enough to see it."""
    target, draft = model([[1, 2, 1], [4, 1, 1]]), model([[1, 1, 1], [2, 1, 1]])
    params, prompt = with_processors(["penalties"]), (1, 0)

    def stale(distribution, draft, accept_uniforms, final_uniforms):
        """The last token by the distribution before the draft, as if its tokens were not counted."""
        right = verify_tokens(distribution, draft, accept_uniforms, final_uniforms)
        return type(right)(right.accepted, distribution[:, 0].draw(final_uniforms[:, 0]))

    grid = partial(token_grid, target, draft, params, prompt)
    distribution = exact_distribution(maker(target, draft, 1, break_rule=with_rule(stale)), prompt, 3, grid, params)
    assert distance(distribution, processed_distribution(target, params, prompt, 3)) > 0.01


# -- constraints, alone and with every processor ---------------------------------------------------------------

# an even number of zeros, no two ones in a row; token 2 ends it
EVEN_ZEROS = Automaton([{0: 2, 1: 1, 2: None}, {0: 2, 2: None}, {0: 0, 1: 3}, {0: 0}])
EVEN_ENDING = {"stop_token_ids": (2,)}
EVEN_PAIR = model([[1, 2, 1], [4, 1, 1], [1, 1, 2]]), model([[1, 1, 1], [2, 1, 1], [1, 4, 1], [1, 2, 4]])
SOME = [(), ("top_p",), ("penalties",), ("repetition",), COMBINATIONS[-1]]


def constrained_distribution(
    make,
    params: SamplingParams,
    rule,
    num_tokens: int,
    forgotten: Sequence[Constraint | None] = (EVEN_ZEROS,),
    constraint: Constraint = EVEN_ZEROS,
) -> dict[Tokens, float]:
    """What the loop emits under the constraint, over the uniforms that matter.

    forgotten: which constraints either side may have in the end, None being none.
    """
    target, draft = EVEN_PAIR

    def grid(output: Tokens) -> Grid:
        sides = itertools.product(forgotten, repeat=2)
        grids = [token_grid(target, draft, params, (1, 0), output, each) for each in sides]
        return tuple(pieces_between(edges(pieces)) for pieces in zip(*grids, strict=True))

    return exact_distribution(make, (1, 0), num_tokens, grid, params, rule, constraint)


def edges(several: Sequence[Sequence[tuple[float, float]]]) -> list[float]:
    """Where pieces end."""
    return [edge for pieces in several for edge in itertools.accumulate(size for _, size in pieces)]


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@pytest.mark.parametrize("names", SOME, ids="+".join)
def test_joint_distribution_under_a_constraint(names: tuple[str, ...], rule) -> None:
    """Outputs that are complete, and those that are cut, each with the probability of decoding without a draft."""
    params = with_processors(names, **EVEN_ENDING)
    distribution = constrained_distribution(maker(*EVEN_PAIR, 1), params, rule, 4)
    assert distance(distribution, processed_distribution(EVEN_PAIR[0], params, (1, 0), 4, EVEN_ZEROS)) < 1e-12
    assert all(output.count(0) % 2 == 0 for output in distribution if output[-1] == 2)


class Obvious:
    """Which tokens may follow, by what the whole output then is; nothing may behind a stop token, which is 2."""

    def __init__(self, fits: Callable[[Tokens], bool]) -> None:
        self.fits = fits

    def after(self, output: Tokens) -> set[int] | None:
        prefixes = (output[:end] for end in range(1, len(output) + 1))
        if 2 in output or not all(map(self.fits, prefixes)):
            return None
        return {token for token in range(3) if self.fits((*output, token))}


def has_no_bad_word(output: Tokens) -> bool:
    text = "".join("ab."[token] for token in output)
    return "aba" not in text and "bb" not in text


STOP = frozenset({2})
WITHOUT = Without(("aba", "bb"), {0: b"a", 1: b"b"}, STOP, 3)
LIMITS = {  # as the library has them, and by definition
    "min_tokens": (AtLeast(2, STOP, 3), Obvious(lambda output: 2 not in output[:2])),
    "bad_words": (WITHOUT, Obvious(has_no_bad_word)),
    "both": (
        AllOf((AtLeast(2, STOP, 3), WITHOUT)),
        Obvious(lambda output: 2 not in output[:2] and has_no_bad_word(output)),
    ),
    "with an automaton": (
        AllOf((EVEN_ZEROS, AtLeast(3, STOP, 3))),
        Obvious(lambda output: 2 not in output[:3] and output[-1] in (EVEN_ZEROS.after(output[:-1]) or ())),
    ),
}


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("names", [(), COMBINATIONS[-1]], ids="+".join)
def test_joint_distribution_under_bad_words_and_min_tokens(names: tuple[str, ...], limit: str, rule) -> None:
    """At each drafted position what is forbidden is so given the tokens drafted before it, as without a draft."""
    params, (constraint, oracle) = with_processors(names, **EVEN_ENDING), LIMITS[limit]
    distribution = constrained_distribution(maker(*EVEN_PAIR, 1), params, rule, 4, (oracle,), constraint)
    assert distance(distribution, processed_distribution(EVEN_PAIR[0], params, (1, 0), 4, oracle)) < 1e-12
    if not names:  # else truncation may have taken what is forbidden
        assert distance(distribution, processed_distribution(EVEN_PAIR[0], params, (1, 0), 4)) > 0.01


@pytest.mark.parametrize("names", [(), COMBINATIONS[-1]], ids="+".join)
def test_coupled_joint_distribution_under_a_constraint(names: tuple[str, ...]) -> None:
    """And each piece of noise gives what it gives without speculation."""
    (target, draft), params, num_tokens = EVEN_PAIR, with_processors(names, **EVEN_ENDING), 2
    pieces = coupled_pieces((target, draft), (1, 0), num_tokens, params, EVEN_ZEROS)
    runs = coupled_runs(maker(target, draft, 1), (1, 0), pieces, params, constraint=EVEN_ZEROS)
    assert runs == coupled_runs(decoder_of(plain, 0, target=target), (1, 0), pieces, params, constraint=EVEN_ZEROS)
    assert (
        distance(
            exact_coupled_distribution(runs), processed_distribution(target, params, (1, 0), num_tokens, EVEN_ZEROS)
        )
        < 1e-12
    )


# after 1 comes 0 or 2, after 2 comes 1 or 2: of two halves there is always one left
TURNS = Automaton([{0: 0, 1: 1, 2: 2}, {0: 0, 2: 2}, {1: 1, 2: 2}])
TURNED, TURNING = FeatureTarget(table(1, HALVES[:3])), MarkovModel(table(2, HALVES[:3]))


@pytest.mark.parametrize("records", [False, True])
@pytest.mark.parametrize(("propose", "gamma"), [(plain, 0), (ngram, 2), (head, 1), (head, 2), (hybrid, 2)])
def test_joint_distribution_of_each_proposer_under_a_constraint(propose, gamma: int, records: bool) -> None:
    """Drafts of two tokens, copied ones cut where they are not allowed, and drafts that are not recorded for it."""
    make = decoder_of(propose, gamma, records, TURNED, TURNING)
    distribution = exact_distribution(make, PROMPT, 4, (2, 2, 2), constraint=TURNS)
    assert distance(distribution, processed_distribution(TURNED, SamplingParams(), PROMPT, 4, TURNS)) < 1e-12


@pytest.mark.parametrize(
    "broken",
    [
        {"decoder": mutants.UnconstrainedTarget},
        {"proposer": mutants.UnconstrainedDraw},
        {"decoder": mutants.ConstraintNotRolledBack},
    ],
    ids=["constraint on the draft alone", "constraint on the declared distribution alone", "rejected tokens kept"],
)
def test_broken_constraints_are_detected(broken: dict) -> None:
    params = SamplingParams(**EVEN_ENDING)
    distribution = constrained_distribution(
        maker(*EVEN_PAIR, 1, **broken), params, verify_tokens, 3, (EVEN_ZEROS, None)
    )
    assert distance(distribution, processed_distribution(EVEN_PAIR[0], params, (1, 0), 3, EVEN_ZEROS)) > 0.01


def test_a_constraint_on_the_target_alone_is_lossless() -> None:
    """Though it looks like a bug: the draft declares what it was drawn from, and forbidden tokens are rejected."""
    params = SamplingParams(**EVEN_ENDING)
    make = maker(*EVEN_PAIR, 1, proposer=mutants.UnconstrainedDraft)
    distribution = constrained_distribution(make, params, verify_tokens, 3, (EVEN_ZEROS, None))
    assert distance(distribution, processed_distribution(EVEN_PAIR[0], params, (1, 0), 3, EVEN_ZEROS)) < 1e-12
