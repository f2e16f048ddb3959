"""Progress of an output in a constraint, and its use in the loop; for exact distributions see test_enumeration.py."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.toys import Automaton
from hypothesis import given
from hypothesis import strategies as st

from specdec import SamplingParams
from specdec.conformance.toys import FeatureTarget, ToyHead, grid_pair
from specdec.constraints.progress import DeadEndError, Progress, fewest_tokens, masks
from specdec.decoding import Decoder
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.proposers.suffix import SuffixProposer
from specdec.requests import Request

# an even number of zeros, no two ones in a row; token 2 ends it
EVEN_ZEROS = Automaton([{0: 2, 1: 1, 2: None}, {0: 2, 2: None}, {0: 0, 1: 3}, {0: 0}])
STOP = frozenset([2])


def obviously_allowed(output: list[int]) -> list[bool] | None:
    """Which of the three tokens are allowed next, by the definition of the language."""
    if 2 in output or any(a == b == 1 for a, b in pairwise(output)):
        return None
    return [True, output[-1:] != [1], output.count(0) % 2 == 0]


def follow(tokens: list[int]) -> list[int]:
    """The longest prefix of the tokens that is allowed."""
    output: list[int] = []
    for token in tokens:
        allowed = obviously_allowed(output)
        if allowed and allowed[token]:
            output.append(token)
    return output


token_lists = st.lists(st.integers(0, 2), max_size=6)


@given(st.lists(st.tuples(token_lists, token_lists), max_size=5), token_lists)
def test_progress_depends_on_emitted_tokens_only(rounds: list, drafted: list[int]) -> None:
    """Drafts that are rejected or partly emitted leave no trace."""
    progress, output = Progress(EVEN_ZEROS), []
    for looked_at, emitted in [*rounds, (drafted, [])]:
        for size in range(len(looked_at) + 1):
            allowed = progress.allowed_after(tuple(looked_at[:size]))
            expected = obviously_allowed(output + looked_at[:size])
            assert (allowed if allowed is None else allowed.tolist()) == expected
        in_a_row = [obviously_allowed(output + looked_at[:size]) for size in range(len(looked_at))]
        fits = [allowed is not None and allowed[token] for allowed, token in zip(in_a_row, looked_at, strict=True)]
        assert progress.num_allowed(looked_at) == [*fits, False].index(False)
        longer = follow(output + emitted)
        progress.emit(longer[len(output) :])
        output = longer


@given(token_lists, st.lists(st.integers(0, 2), min_size=3, max_size=3))
def test_masks_are_those_of_the_last_positions(output: list[int], drafted: list[int]) -> None:
    """In a batch with an unconstrained row."""
    output, tokens = follow(output), torch.tensor([drafted, drafted])
    for num_positions in range(1, 5):
        both = masks([Progress(EVEN_ZEROS, output), None], tokens, num_positions, 3)
        expected = [obviously_allowed(output + drafted[:size]) or [True] * 3 for size in range(4)]
        assert both[0].tolist() == expected[4 - num_positions :]
        assert both[1].all()
    alone = masks([Progress(EVEN_ZEROS, output)], None, 1, 3)
    assert alone[0].tolist() == [obviously_allowed(output) or [True] * 3]


# -- the loop ------------------------------------------------------------------------------------------------

TARGET, DRAFT = grid_pair(12)
FEATURES = FeatureTarget(TARGET.table)


def copies() -> NgramProposer:
    return NgramProposer(3, TARGET.device, lambda: LookupIndex(1, 2))


PROPOSERS = {
    "plain": lambda: None,
    "ngram": copies,
    "draft_model": lambda: DraftModelProposer(DRAFT),
    "eagle": lambda: EagleProposer(ToyHead(DRAFT)),
    "suffix": lambda: SuffixProposer(3, TARGET.device),
    "hybrid": lambda: HybridProposer(copies(), EagleProposer(ToyHead(DRAFT))),
}


def run(name: str, requests: list[Request], max_batch_size: int = 1) -> list:
    decoder = Decoder(FEATURES, PROPOSERS[name](), 3 if name != "plain" else 0, max_batch_size=max_batch_size)
    return sorted(decoder.run(requests), key=lambda row: row.request.index)


def requests() -> list[Request]:
    """Every other one constrained, some greedy, some with penalties."""
    constraints, prompts = [EVEN_ZEROS, None], [(0, 1, 2, 0, 1), (2,), (1, 1, 0, 1, 1)]
    return [
        Request(
            i,
            prompts[i % 3],
            SamplingParams(seed=i, max_tokens=3 + i, temperature=i % 3 / 2, frequency_penalty=0.3 * (i % 4)),
            STOP,
            constraint=constraints[i % 2],
        )
        for i in range(10)
    ]


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_row_in_any_batch_equals_the_row_alone(name: str) -> None:
    """Constrained and unconstrained rows in slots that are reused."""
    alone = [run(name, [each])[0].output for each in requests()]
    for max_batch_size in (3, 10):
        assert [row.output for row in run(name, requests(), max_batch_size)] == alone


@pytest.mark.parametrize("name", PROPOSERS)
def test_stopped_outputs_are_complete_and_truncated_ones_are_valid_prefixes(name: str) -> None:
    params = [SamplingParams(seed=seed, max_tokens=6) for seed in range(40)]
    rows = run(name, [Request(i, (0, 1, 0, 1), each, STOP, constraint=EVEN_ZEROS) for i, each in enumerate(params)], 8)
    assert {row.finish_reason for row in rows} == {"stop", "length"}
    for row in rows:
        assert follow(row.output) == row.output
        assert (row.finish_reason == "stop") == (row.output[-1] == 2)


class AlwaysOnes:
    def continuation(self, tokens: list[int], limit: int) -> list[int]:
        return [1] * limit


NO_TWO_ONES = Automaton([{0: 0, 1: 1, 2: 0}, {0: 0, 2: 0}])


def test_copies_end_before_the_first_token_that_is_not_allowed() -> None:
    """No two ones are allowed in a row: one is proposed, and none after a one."""
    decoder = Decoder(TARGET, NgramProposer(3, TARGET.device, AlwaysOnes), 3)
    (free,) = decoder.run([Request(0, (0, 1), SamplingParams(max_tokens=30))])
    assert {step.num_drafted for step in free.steps[:-3]} == {3}
    (row,) = decoder.run([Request(0, (0, 1), SamplingParams(max_tokens=30), constraint=NO_TWO_ONES)])
    output, places = row.output, [1]
    for step in row.steps:
        places.append(places[-1] + step.num_accepted + (step.last is not None))
    expected = [int(output[place - 1] != 1 and place < 29) for place in places[:-1]]
    assert [step.num_drafted for step in row.steps] == expected
    assert {0, 1} == set(expected)


def test_suffix_copies_end_before_the_first_token_that_is_not_allowed() -> None:
    """A text of ones continues with ones: three are copied, or none after the first where no two are allowed."""
    decoder = Decoder(TARGET, SuffixProposer(3, TARGET.device), 3)
    params = SamplingParams(max_tokens=9, logit_bias={1: 99.0})
    for constraint, expected in ((None, 3), (NO_TWO_ONES, 0)):
        (row,) = decoder.run([Request(0, (1,) * 9, params, constraint=constraint)])
        assert row.output[0] == 1
        assert row.steps[0].num_drafted == expected


def test_a_dead_end_is_an_error_only_if_an_output_reaches_it() -> None:
    leads_nowhere = Automaton([{0: 0, 1: 1}, {}])
    draft_looks_into_it = Progress(leads_nowhere)
    assert draft_looks_into_it.allowed_after((1,)) is None
    draft_looks_into_it.emit([0, 0])
    request = Request(0, (0, 1), SamplingParams(max_tokens=50), constraint=leads_nowhere)
    with pytest.raises(DeadEndError, match=r"neither a next token nor an end after \d+ emitted tokens"):
        run("draft_model", [request])
    bias = SamplingParams(max_tokens=5, logit_bias={1: -1e9})
    assert run("draft_model", [Request(0, (0, 1), bias, constraint=leads_nowhere)])[0].output == [0] * 5


# -- what can be known beforehand ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "most", "expected"),
    [
        ([{0: 0, 2: None}], 9, 1),  # complete at once
        ([{0: 1}, {0: 2, 1: 0}, {2: None}], 9, 3),
        ([{0: 1}, {0: 2, 1: 0}, {2: None}], 2, 3),  # one too many
        ([{0: 0}], 9, 10),  # never ends
        ([{0: 1}, {}], 9, 10),  # leads nowhere
    ],
)
def test_the_fewest_tokens_are_found(table: list, most: int, expected: int) -> None:
    assert fewest_tokens(Automaton(table), STOP, most) == expected


def test_too_many_states_give_a_lower_bound() -> None:
    """Two choices at each of a hundred tokens: a lower bound is returned quickly."""
    ladder = Automaton([*({0: i + 1, 1: i + 1} for i in range(100)), {2: None}])
    assert 5 < fewest_tokens(ladder, STOP, 200) <= 101
    assert fewest_tokens(ladder, STOP, 4) == 5
