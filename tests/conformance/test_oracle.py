"""The parts of the oracle by hand: pieces, scripts and races; and the whole of it on the smallest loops."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from helpers.toys import Automaton, coupled_pieces, processed_distribution

from specdec.conformance import enumeration
from specdec.conformance.enumeration import (
    Each,
    ScriptedNoise,
    ScriptedUniforms,
    StepUniforms,
    coupled_runs,
    equal_pieces,
    exact_coupled_distribution,
    exact_distribution,
    pieces_between,
    race_pieces,
)
from specdec.conformance.gates import distance
from specdec.conformance.mutants import accept_always, maker, tree_maker
from specdec.conformance.toys import HALVES, FeatureTarget, ToyHead, joint_distribution, table
from specdec.models.markov import MarkovModel
from specdec.proposers.heads.eagle import EagleProposer
from specdec.sampling.randomness import Role, on_branch
from specdec.sampling_params import SamplingParams
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree

FORK = Tree(((0,), (1,), (0, 0)))

# -- pieces ----------------------------------------------------------------------------------------------------


def test_equal_pieces_are_represented_by_their_midpoints() -> None:
    assert equal_pieces(1) == [(0.5, 1.0)]
    assert equal_pieces(4) == [(0.125, 0.25), (0.375, 0.25), (0.625, 0.25), (0.875, 0.25)]


def test_thresholds_closer_than_rounding_are_one() -> None:
    assert pieces_between([0.5, 0.5 + 2e-9]) == [
        (0.25, 0.5),
        (pytest.approx(0.5 + 1e-9, abs=1e-12), pytest.approx(2e-9)),
        (pytest.approx(0.75), pytest.approx(0.5)),
    ]
    assert pieces_between([0.5, 0.5 + 5e-10, 5e-10, 1 - 5e-10, 1.5, -0.5]) == [(0.25, 0.5), (0.75, 0.5)]


def test_each_position_may_have_pieces_of_its_own() -> None:
    own = Each((2, [(0.25, 1.0)], 3))
    assert enumeration._for_each(own, 2) == [equal_pieces(2), [(0.25, 1.0)]]
    assert enumeration._for_each(2, 3) == [equal_pieces(2)] * 3
    assert enumeration._for_each([(0.1, 1.0)], 1) == [[(0.1, 1.0)]]
    assert enumeration._for_each(own, 0) == []


def test_the_choices_of_a_step_are_all_combinations_of_its_pieces() -> None:
    """Draft positions in turn, then accepts, then the last; positions that are not drafted read 0.5."""
    choices = list(enumeration._choices((Each((2, 1)), Each(([(0.1, 0.3), (0.9, 0.7)], 1)), 2), 2, 1))
    assert choices[0] == (StepUniforms((0.25, 0.5, 0.5), (0.1, 0.5, 0.5), 0.25), pytest.approx(0.5 * 0.3 * 0.5))
    assert [step.last for step, _ in choices] == [0.25, 0.75] * 4
    assert [step.accept[0] for step, _ in choices] == [0.1, 0.1, 0.9, 0.9] * 2
    assert [step.draft[0] for step, _ in choices] == [0.25] * 4 + [0.75] * 4
    assert sum(weight for _, weight in choices) == pytest.approx(1)
    assert list(enumeration._choices((2, 3, 1), 0, 2)) == [(StepUniforms((0.5, 0.5), (0.5, 0.5), 0.5), 1.0)]


# -- scripts ---------------------------------------------------------------------------------------------------

STEP = StepUniforms((0.01, 0.02, 0.03), (0.11, 0.12, 0.13), 0.21)


def read(source: ScriptedUniforms, *keys: tuple[int, int, int, int]) -> list[float]:
    """keys: (seed, position, role, origin) of the columns of one row."""
    read = source(*(torch.tensor([column]) for column in zip(*keys, strict=True)))
    assert read.dtype == torch.float64
    return read[0].tolist()


def test_a_script_is_read_by_row_step_role_and_position() -> None:
    source = ScriptedUniforms([{}, {7: STEP, 9: StepUniforms((0.9,), (0.8,), 0.7)}])
    drafts = [(1, position, Role.DRAFT, 7) for position in (7, 8, 9)]
    accepts = [(1, position, Role.ACCEPT, 7) for position in (7, 8, 9)]
    lasts = [(1, 8, Role.RECOVER, 7), (1, 10, Role.BONUS, 7)]
    assert read(source, *drafts, *accepts, *lasts) == [0.01, 0.02, 0.03, 0.11, 0.12, 0.13, 0.21, 0.21]
    assert read(source, (1, 9, Role.DRAFT, 9), (1, 9, Role.ACCEPT, 9), (1, 9, Role.BONUS, 9)) == [0.9, 0.8, 0.7]
    assert read(source, (1, 8, Role.DRAFT, 8), (0, 7, Role.DRAFT, 7)) == [0.5, 0.5]  # steps without a script


def test_rows_of_a_script_may_share_a_role_and_an_origin() -> None:
    source = ScriptedUniforms([{7: STEP}, {}])
    found = source(
        torch.tensor([[0], [1]]), torch.tensor([[7, 8], [7, 8]]), torch.tensor([[Role.DRAFT]]), torch.tensor([[7]])
    )
    assert found.tolist() == [[0.01, 0.02], [0.5, 0.5]]


def test_nodes_of_a_tree_have_uniforms_of_their_own() -> None:
    """Level by level: two nodes below the text, one below the first of them."""
    source = ScriptedUniforms([{7: STEP}], FORK)
    keys = [(0, 7, 0), (0, 7, 1), (0, 8, 0)]
    for role, expected in ((Role.DRAFT, [0.01, 0.02, 0.03]), (Role.ACCEPT, [0.11, 0.12, 0.13])):
        assert read(source, *((seed, place, on_branch(role, branch), 7) for seed, place, branch in keys)) == expected
    assert read(source, (0, 8, on_branch(Role.BONUS, 1), 7)) == [0.21]


# -- outcomes --------------------------------------------------------------------------------------------------

TARGET, DRAFT = MarkovModel(table(0, HALVES)), MarkovModel(table(3, HALVES))
PROMPT = (1, 2)


def test_no_step_drafts_the_last_token() -> None:
    """The last token of an output is never drafted; a level of a tree is drafted whole or not."""
    params = SamplingParams(max_tokens=4, stop_token_ids=(2,))
    runs = enumeration._Runs(maker(TARGET, DRAFT, 2), PROMPT, params, verify_tree, None, None)
    assert runs.gamma == 2
    assert [runs.max_drafted((0,) * count) for count in range(1, 4)] == [2, 1, 0]
    assert [runs.is_over(tokens) for tokens in ((0, 0, 0, 0), (0, 2), (2, 0), (0, 0, 0))] == [True, True, False, False]
    forked = enumeration._Runs(tree_maker(TARGET, DRAFT, FORK), PROMPT, params, verify_tree, None, FORK)
    assert [forked.max_drafted((0,) * count) for count in range(1, 4)] == [3, 2, 0]


def step_of(num_drafted: int, num_accepted: int, last: int | None) -> SimpleNamespace:
    return SimpleNamespace(num_drafted=num_drafted, num_accepted=num_accepted, last=last)


def test_an_outcome_is_what_was_emitted_and_drafted_up_to_a_step() -> None:
    """The prefill emits one token; a step all accepted ones, and one more unless a stop token was among them."""
    steps = [step_of(2, 1, 7), step_of(3, 2, 8), step_of(2, 2, None), step_of(9, 9, 9)]
    row = SimpleNamespace(output=list(range(20)), steps=steps)
    emitted = [enumeration._outcome(row, number, [5, 6, 4, 3]) for number in (1, 2, 3)]
    assert [len(each.tokens) for each in emitted] == [3, 6, 8]
    assert [each.drafted for each in emitted] == [(5, 6), (5, 6, 4), (5, 6)]
    assert emitted[0].tokens == (0, 1, 2)


# -- the smallest loops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "num_tokens"), [(1, 3), (2, 4)])
@pytest.mark.parametrize("stop", [(), (1,)])
def test_the_distribution_of_a_small_loop(gamma: int, num_tokens: int, stop: tuple[int, ...]) -> None:
    """On a grid of halves, and with the same pieces given for each output."""
    params = SamplingParams(stop_token_ids=stop, max_tokens=9)
    make, truth = maker(TARGET, DRAFT, gamma), processed_distribution(TARGET, params, PROMPT, num_tokens)
    found = exact_distribution(make, PROMPT, num_tokens, (2, 2, 2), params)
    assert found == pytest.approx(truth, abs=1e-12)
    assert all(type(output) is tuple and found[output] > 0 for output in found)
    assert exact_distribution(make, PROMPT, num_tokens, lambda output: (2, 2, 2), params) == found


def test_grids_follow_the_output() -> None:
    asked: list[tuple[int, ...]] = []

    def grid(output: tuple[int, ...]):
        asked.append(output)
        return (2, 2, 2)

    exact_distribution(maker(TARGET, DRAFT, 1), PROMPT, 2, grid)
    firsts = {output[:1] for output in joint_distribution(TARGET, PROMPT, 1)}
    assert set(asked) == {(), *firsts}


def test_a_loop_that_is_lossy_has_another_distribution() -> None:
    """The draft's own tokens, whatever the target thinks of them."""
    found = exact_distribution(maker(TARGET, DRAFT, 1), PROMPT, 3, (2, 2, 2), rule=accept_always)
    assert sum(found.values()) == pytest.approx(1)
    assert distance(found, joint_distribution(TARGET, PROMPT, 3)) > 0.1


def test_positions_that_a_recorded_step_does_not_draft_are_read_all_the_same() -> None:
    """A recorded step has one size: near the end of an output it reads uniforms that it may not use."""
    target, prompt = FeatureTarget(TARGET.table), (0, 1, 2, 0)
    make = maker(target, ToyHead(DRAFT), 2, proposer=EagleProposer, records=True)
    found = exact_distribution(make, prompt, 3, (2, 2, 2))
    assert found == pytest.approx(joint_distribution(target, prompt, 3), abs=1e-12)


TURNS = Automaton([{0: 0, 1: 1, 2: 2}, {0: 0, 2: 2}, {1: 1, 2: 2}])


def test_the_distribution_of_a_small_loop_under_a_constraint() -> None:
    found = exact_distribution(maker(TARGET, DRAFT, 1), PROMPT, 3, (2, 2, 2), constraint=TURNS)
    assert found == pytest.approx(processed_distribution(TARGET, SamplingParams(), PROMPT, 3, TURNS), abs=1e-12)


def test_the_distribution_of_a_small_tree() -> None:
    found = exact_distribution(tree_maker(TARGET, DRAFT, FORK), PROMPT, 3, (2, 2, 2), rule=verify_tree, tree=FORK)
    assert found == pytest.approx(joint_distribution(TARGET, PROMPT, 3), abs=1e-12)


# -- races -----------------------------------------------------------------------------------------------------


def noise(*shares: float) -> tuple[float, ...]:
    return tuple(pytest.approx(1 - math.exp(-share)) for share in shares)


def test_a_race_of_two_tokens_by_hand() -> None:
    """The triangle is cut from the third corner through the middle of the opposite side; a point of each half is its
    center of gravity: means of (1, 0, 0), (0, 0, 1), (1/2, 1/2, 0), and the mirror image."""
    pieces = race_pieces([[0.5, 0.5]])
    assert sorted(pieces) == [
        (noise(1 / 6, 1 / 2), Fraction(1, 2)),
        (noise(1 / 2, 1 / 6), Fraction(1, 2)),
    ]


def test_pieces_have_the_sizes_of_the_distribution() -> None:
    """The token of the smallest waiting time relative to its probability wins; a certain one needs one piece."""
    assert sorted(weight for _, weight in race_pieces([[0.25, 0.75]])) == [Fraction(1, 4), Fraction(3, 4)]
    assert [weight for _, weight in race_pieces([[1.0, 0.0]])] == [1]
    assert race_pieces([[1.0, 0.0, 0.0]]) == [(noise(1 / 3, 1 / 3, 1 / 3), 1)]
    assert sorted(weight for _, weight in race_pieces([[0.5, 0.5, 0.0]])) == [Fraction(1, 2)] * 2
    assert sorted(weight for _, weight in race_pieces([[1 / 3] * 3])) == [Fraction(1, 6)] * 6
    assert len(race_pieces([[0.25, 0.75], [0.75, 0.25], [0.25, 0.75 + 1e-9]])) == 3


@pytest.mark.parametrize("size", [1, 4])
def test_races_of_other_sizes_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"distributions over {size} tokens must be over two or three; use a smaller"):
        race_pieces([[1 / size] * size])


CORNERS = [tuple(Fraction(int(i == j)) for j in range(3)) for i in range(3)]


def points(*rows: tuple[int, int, int], scale: int = 1) -> list[tuple[Fraction, ...]]:
    return [tuple(Fraction(x, scale) for x in row) for row in rows]


def test_a_triangle_is_clipped_by_hand() -> None:
    """Sides of the corners: the boundary lies where they change sign, in proportion; corners on it belong to both."""
    clip, sides = enumeration._clipped, [Fraction(1), Fraction(-3), Fraction(0)]
    assert clip(CORNERS, sides) == points((4, 0, 0), (3, 1, 0), (0, 0, 4), scale=4)
    assert clip(CORNERS, [-side for side in sides]) == points((3, 1, 0), (0, 4, 0), (0, 0, 4), scale=4)
    assert clip(CORNERS, [Fraction(1)] * 3) == CORNERS
    assert clip(CORNERS, [Fraction(-1)] * 3) == []
    quarter = clip(CORNERS, [Fraction(-1), Fraction(1), Fraction(1)])
    assert quarter == points((1, 0, 1), (1, 1, 0), (0, 2, 0), (0, 0, 2), scale=2)
    assert enumeration._area(quarter) == Fraction(3, 4)


def test_areas_and_centers_by_hand() -> None:
    assert enumeration._area(CORNERS) == 1
    assert enumeration._area(points((4, 0, 0), (3, 1, 0), (0, 0, 4), scale=4)) == Fraction(1, 4)
    assert enumeration._area(points((1, 0, 0), (0, 1, 0))) == 0
    assert enumeration._area([]) == 0
    assert enumeration._center(CORNERS) == (Fraction(1, 3),) * 3
    rows = points((1, 2, 3), (0, 1, 4), (5, 6, 0))
    assert enumeration._determinant(*rows) == 1
    assert enumeration._determinant(rows[1], rows[0], rows[2]) == -1


def test_noise_is_read_by_row_position_and_token() -> None:
    """From the first position on; beyond the last one, where only padding lies, the last is read."""
    values = torch.arange(12, dtype=torch.float64).view(2, 2, 3)
    source = ScriptedNoise(values, 5)
    found = source(
        torch.tensor([[1]]), torch.tensor([[5, 6, 7]]), torch.tensor([[Role.COUPLED]]), torch.tensor([[2, 0, 1]])
    )
    assert found.tolist() == [[8.0, 9.0, 10.0]]
    with pytest.raises(ValueError, match=r"roles=\[\[4, 2\]\] must be 4: all draws are coupled here"):
        source(*(torch.tensor([[each, each]]) for each in (0, 5)), torch.tensor([[4, 2]]), torch.tensor([[0, 0]]))


def test_each_choice_of_noise_gives_an_output_with_its_probability() -> None:
    """The last position's noise varies fastest."""
    pieces = coupled_pieces((TARGET, DRAFT), PROMPT, 2)
    runs = coupled_runs(maker(TARGET, DRAFT, 1), PROMPT, pieces)
    sizes = [first * second for _, first in pieces[0] for _, second in pieces[1]]
    assert [weight for _, weight in runs] == sizes
    assert {len(output) for output, _ in runs} == {2}
    assert sum(weight for _, weight in runs) == 1
    assert exact_coupled_distribution(runs) == pytest.approx(joint_distribution(TARGET, PROMPT, 2), abs=1e-12)
    stopped = coupled_runs(maker(TARGET, DRAFT, 1), PROMPT, pieces, SamplingParams(stop_token_ids=(1,), max_tokens=9))
    truth = processed_distribution(TARGET, SamplingParams(stop_token_ids=(1,)), PROMPT, 2)
    assert exact_coupled_distribution(stopped) == pytest.approx(truth, abs=1e-12)
