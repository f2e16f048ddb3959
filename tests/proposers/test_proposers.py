"""N-gram indices against slow obvious versions, and a draft model that stays in step."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from specdec import Engine, SamplingParams
from specdec.conformance.toys import grid_pair
from specdec.models.causal import CausalLM
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.ngram import CountIndex, LookupIndex, pad
from specdec.requests import Batch, Generation, Request
from specdec.sampling.state import SamplingState

texts = st.lists(st.integers(0, 2), min_size=1, max_size=30)


def obvious_lookup(tokens: list[int], limit: int, min_ngram: int, max_ngram: int) -> list[int]:
    """Scan for the longest suffix, from the right, and copy; the copy may run on into itself."""
    for size in range(max_ngram, min_ngram - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for i in range(limit):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


def obvious_counts(tokens: list[int], limit: int, min_ngram: int, max_ngram: int) -> list[int]:
    """Recount everything for each token; among equally frequent ones the latest occurrence wins."""
    draft: list[int] = []
    while len(draft) < limit:
        text = tokens + draft
        for size in range(max_ngram, min_ngram - 1, -1):
            if size > len(text):
                continue
            ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == text[len(text) - size :]]
            if ends:
                followers = [tokens[end] for end in ends]
                most = max(map(followers.count, followers))
                # the token that reached the highest count last
                reached = {
                    t: [i for i, f in enumerate(followers) if f == t][most - 1]
                    for t in followers
                    if followers.count(t) == most
                }
                draft.append(max(reached, key=reached.__getitem__))
                break
        else:
            return draft
    return draft


@pytest.mark.parametrize(("index", "obvious"), [(LookupIndex, obvious_lookup), (CountIndex, obvious_counts)])
@given(tokens=texts, cuts=st.sets(st.integers(1, 30)), limit=st.integers(1, 6))
def test_incremental_index_equals_a_full_scan(index, obvious, tokens: list[int], cuts: set[int], limit: int) -> None:
    """The text grows by pieces of any length, and every answer is that of a scan of the text so far."""
    grown = index(1, 3)
    for end in [*sorted(cut for cut in cuts if cut < len(tokens)), len(tokens)]:
        assert grown.continuation(tokens[:end], limit) == obvious(tokens[:end], limit, 1, 3)


class Counted(list[int]):
    """Tokens that count how many of them were looked at."""

    looked_at = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.looked_at += len(found) if isinstance(key, slice) else 1
        return found


def most_looked_at(continuation) -> int:
    """In one step of many, while a text of 2,000 tokens over a vocabulary of ten grows by four tokens a step."""
    text = torch.randint(0, 10, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, most = Counted(), 0
    for start in range(0, len(text), 4):
        tokens += text[start : start + 4]
        tokens.looked_at = 0
        continuation(tokens, 5)
        most = max(most, tokens.looked_at)
    return most


@pytest.mark.parametrize("index", [LookupIndex, CountIndex])
def test_a_step_costs_the_same_however_long_the_text_is(index) -> None:
    """Counted, not timed: n-grams of 2, 3 and 4 are 9 tokens to look at after each new token, and once to find them;
    a scan of the text looks at it all.
    """
    assert most_looked_at(index(2, 4).continuation) <= 4 * (9 + 1) + 9 + 5
    assert most_looked_at(lambda tokens, limit: obvious_lookup(tokens, limit, 2, 4)) > 2000


def test_a_repeating_text_is_continued_as_repeating() -> None:
    assert LookupIndex(1, 3).continuation([7, 8, 7, 8, 7], 5) == [8, 7, 8, 7, 8]


def test_nothing_known_is_no_draft() -> None:
    assert LookupIndex(2, 4).continuation([1, 2, 3], 4) == []
    assert CountIndex(2, 4).continuation([1, 2, 3], 4) == []


@pytest.mark.parametrize("sizes", [(0, 3), (3, 2)])
def test_impossible_ngram_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"min_ngram={sizes[0]} must be at least 1 and at most max_ngram={sizes[1]}"):
        LookupIndex(*sizes)


def test_padding() -> None:
    tokens, lengths = pad([[1, 2], [], [3]], torch.device("cpu"))
    assert tokens.tolist() == [[1, 2], [0, 0], [3, 0]]
    assert lengths.tolist() == [2, 0, 1]
    assert pad([[], []], torch.device("cpu"))[0].shape == (2, 0)


@pytest.mark.parametrize("max_batch_size", [1, 3])
@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_self_draft_stays_in_step_while_slots_change_hands(max_batch_size: int, gamma: int) -> None:
    """A draft equal to the target is accepted always, in each step of ten requests through three slots."""
    target, _ = grid_pair(1)
    engine = Engine(
        target, method="draft_model", draft=target, num_speculative_tokens=gamma, max_batch_size=max_batch_size
    )
    prompts = [[1, 2, 0, 1][: 1 + i % 4] for i in range(10)]
    params = [SamplingParams(max_tokens=3 + 2 * i, seed=i) for i in range(10)]
    for completion in engine.generate(prompts, params) + engine.generate(prompts[::-1], params):
        assert completion.counts.num_accepted == completion.counts.num_drafted > 0


def test_a_draft_model_with_a_shorter_context_drafts_until_it_ends() -> None:
    target, _ = grid_pair(1)
    short = type(target)(target.table, context_length=10)
    engine = Engine(target, method="draft_model", draft=short, num_speculative_tokens=3)
    completion = engine.generate([[0, 1, 2]], SamplingParams(max_tokens=30))[0]
    assert len(completion.token_ids) == 30
    drafted = [step.num_drafted for step in completion.steps]
    assert drafted[0] == 3
    assert drafted[-5:] == [0] * 5


def test_a_row_copies_while_the_others_can_neither_copy_nor_draw() -> None:
    """The draft model's context has ended before the prompts do."""
    target, draft = grid_pair(4)
    draft = type(draft)(draft.table, context_length=4)
    engine = Engine(target, method="hybrid", draft=draft, num_speculative_tokens=3, max_batch_size=2)
    prompts, greedy = [[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]], SamplingParams(temperature=0, max_tokens=20)
    completions = engine.generate(prompts, greedy)
    assert [c.token_ids for c in completions] == [c.token_ids for c in Engine(target).generate(prompts, greedy)]
    drafted = zip(*([step.num_drafted for step in c.steps] for c in completions), strict=False)
    assert {tuple(map(bool, each)) for each in drafted} & {(True, False), (False, True)}


def test_a_lagging_row_catches_up_next_to_an_almost_finished_one() -> None:
    """What a row lacks is fed with the others only as far as all have room for it: here there are two tokens left."""
    model = CausalLM(tiny.make("llama", tiny.GQA))
    rows = [Generation(Request(i, (5, 9), SamplingParams(temperature=0, max_tokens=28)), 0.0) for i in range(2)]
    state = SamplingState([row.request.sampling for row in rows], [], [], model.vocab_size, model.device)
    batch, proposer = Batch(rows, state, num_slots=2, capacity=32), DraftModelProposer(model)
    rows[0].emit([7] * 25)
    rows[1].emit([3])
    proposer.propose(batch, [2, 2])
    rows[1].emit([3, 4] * 8)
    drafted = proposer.propose(batch, [1, 2]).tokens[1].tolist()
    assert drafted == tiny.reference(model.model, rows[1].tokens)[:2]
