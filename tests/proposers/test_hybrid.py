"""Copy or draw: which of them by expected tokens, settled before anything is drawn, or the distribution is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import HALVES, FeatureTarget, ToyHead, grid_pair, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.base import FeatureLayers
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import BetterCopies, HybridProposer
from specdec.proposers.suffix import SuffixProposer
from specdec.requests import Batch, Generation, Request, Step
from specdec.sampling.state import SamplingState
from specdec.verification import Draft, Rule

CPU = torch.device("cpu")
TARGET, DRAFT = FeatureTarget(table(0, HALVES)), MarkovModel(table(10, HALVES))
PROMPT = (0, 1, 2, 0, 1, 2)
COSTS = StepCosts((1.0, 1.1, 1.2), 0.01)


class Afterwards:
    """Draws first, and copies only where the drawn draft does not begin as the copy does."""

    feature_layers: FeatureLayers = ()

    def __init__(self, copies: BetterCopies, fallback) -> None:
        self._copies, self._fallback = copies, fallback

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        guesses = self._copies.guess(batch, limits)
        first = self._fallback.propose(batch, limits).tokens[:, 0].tolist()
        kept = [guess if guess and guess[0] != token else [] for guess, token in zip(guesses, first, strict=True)]

        class Fixed:
            guess = staticmethod(lambda batch, limits: kept)

        return HybridProposer(Fixed(), self._fallback).propose(batch, limits)


@pytest.mark.parametrize("kind", ["draft model", "head", "draft model by costs", "decided afterwards"])
def test_joint_distribution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, while rows choose by the outcome of their own earlier drafts; the mutant chooses by the tokens drawn."""
    monkeypatch.setattr("specdec.proposers.suffix.SAMPLED_DOUBT", 1.5)
    distributions = set()

    def make(source, rule, max_batch_size):
        @Rule
        def recording(distribution, draft, *draws):
            distributions.update(
                (draft.distribution[:, :1].prob(draft.tokens[:, :1])[:, 0] == 1).tolist()
                if draft.tokens.shape[1]
                else []
            )
            return rule(distribution, draft, *draws)

        adaptive = AdaptiveLength(COSTS) if kind.endswith("by costs") else None
        copies = BetterCopies(SuffixProposer(3, CPU, 1 << 20), adaptive)
        drawing = EagleProposer(ToyHead(DRAFT), source) if kind == "head" else DraftModelProposer(DRAFT, source)
        proposer = Afterwards(copies, drawing) if kind == "decided afterwards" else HybridProposer(copies, drawing, 1)
        return Decoder(TARGET, proposer, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    num_tokens = 4
    found = distance(
        exact_distribution(make, PROMPT, num_tokens, (2, 2, 2)), joint_distribution(TARGET, PROMPT, num_tokens)
    )
    assert found > 0.01 if kind == "decided afterwards" else found < 1e-12
    assert distributions == {True, False}, "something is copied and something drawn"


# -- the choice ----------------------------------------------------------------------------------------------


def batch_of(*texts: list[int], temperature: float = 0) -> Batch:
    params = SamplingParams(temperature=temperature, max_tokens=100)
    rows = [Generation(Request(i, tuple(text), params), 0.0) for i, text in enumerate(texts)]
    sampling = SamplingState([params] * len(rows), [()] * len(rows), [()] * len(rows), 99, CPU)
    return Batch(rows, sampling, len(rows), 200)


def alike(number: int) -> list[int]:
    """A text that ends with the tokens with which it begins."""
    return [*range(30), *range(number)]


@pytest.mark.parametrize(("temperature", "shortest"), [(0, 2), (1, 4)])
def test_copies_begin_at_longer_matches_where_tokens_are_drawn(temperature: float, shortest: int) -> None:
    """As measured for smollm2-135m and its head: greedy from two tokens on, at temperature 1 from four or five."""
    batch = batch_of(*(alike(number) for number in range(1, 9)), temperature=temperature)
    guesses = BetterCopies(SuffixProposer(99, CPU)).guess(batch, [2] * 8)
    assert [len(guess) for guess in guesses] == [0] * (shortest - 1) + [2] * (9 - shortest)


@pytest.mark.parametrize(("num_accepted", "shortest"), [(0, 1), (2, 8)])
def test_the_acceptance_of_drawn_drafts_is_used(num_accepted: int, shortest: int) -> None:
    """A draft that was never accepted in ten steps of the row leaves it to copies of any length; one that always was
    to the surest only. The outcome of copies, and of other rows, does not count.
    """
    lengths = []
    for alike in range(1, 9):
        batch, copies = batch_of([*range(30)], [1, 2, 3]), BetterCopies(SuffixProposer(99, CPU))
        row, other = batch.rows
        for number in range(10):
            assert copies.guess(batch, [2, 2]) == [[], []]
            row.tokens.append(40 + number)
            row.steps.append(Step(2, num_accepted, "bonus"))
            other.tokens.append(40 + number)
            other.steps.append(Step(2, 2 - num_accepted, "bonus"))
        row.tokens += range(alike)
        lengths.append(len(copies.guess(batch, [2, 2])[0]))
    assert lengths == [0] * (shortest - 1) + [2] * (9 - shortest)


def test_costs_count_where_they_are_known() -> None:
    """A drawn token costs half a step: no draft is drawn for what a copy would bring for nothing, however little."""
    lengths = {}
    for draft_s in (0.0, 0.5):
        costs = StepCosts((1.0,) * (MAX_DRAFT_LENGTH + 1), draft_s)
        copies = BetterCopies(SuffixProposer(99, CPU), AdaptiveLength(costs))
        lengths[draft_s] = [len(guess) for guess in copies.guess(batch_of(alike(1), alike(3)), [4, 4])]
    assert lengths == {0.0: [0, 4], 0.5: [2, 4]}


@pytest.mark.parametrize("gamma", [1, 4, "auto"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_output_is_plain_decoding(max_batch_size: int, gamma: int | str) -> None:
    target, draft = grid_pair(4)
    options = {"num_speculative_tokens": gamma, "max_batch_size": max_batch_size, "max_history_bytes": 1 << 20}
    prompts, params = [[0, 1, 2, 0], [2], [1, 1], [0, 2, 1]], SamplingParams(temperature=0, max_tokens=30)
    plain = [completion.token_ids for completion in Engine(target).generate(prompts, params)]
    engine = Engine(target, method="hybrid", draft=draft, **options)
    for _ in range(2):
        assert [completion.token_ids for completion in engine.generate(prompts, params)] == plain
