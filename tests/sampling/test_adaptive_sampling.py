"""Drafts of adaptive length above temperature 0: the distribution stays the target's, exactly and through the engine.

The rows are asymmetric: over rows such as (2, 1, 1), in all their orders, the biases of a draft that ends by looking at
its own tokens cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.gates import distance, marginal, passes, radius
from helpers.toys import ExitTarget, FeatureTarget, ToyHead, joint_distribution, processed_distribution, table

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution, pieces_between
from specdec.decoding import Decoder
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import draw_chain
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.eagle import EagleProposer
from specdec.verification import Draft, Rule

DRAW_S = (
    0.3  # of a step's second: after a row of (1, 1) / 2 another token pays not quite, after one of (3, 1) / 4 it does
)
COSTS = StepCosts((1.0,) * (MAX_DRAFT_LENGTH + 1), DRAW_S)


def looks_at_its_tokens(draft: Draft, least: float) -> Draft:
    """The planted bug: a draft ends before the first of its tokens that the draft itself thinks little of."""
    likely = (draft.distribution.prob(draft.tokens) >= least).long().cumprod(1).sum(1)
    return replace(draft, num_proposed=torch.minimum(draft.num_proposed, likely))


# -- exactly ---------------------------------------------------------------------------------------------------

DRAFT_ROWS = torch.tensor([[3, 1], [2, 2]]).double() / 4
TARGET_ROWS = torch.tensor([[3, 1], [1, 3], [2, 2], [4, 0]]).double() / 4
TARGET, DRAFT = FeatureTarget(table(3, TARGET_ROWS)), MarkovModel(table(3, DRAFT_ROWS))
GRID = (pieces_between([1 / 2, 3 / 4]), pieces_between([1 / 3, 1 / 2, 2 / 3]), 4)
PROPOSERS: dict[str, Any] = {"draft_model": (DraftModelProposer, DRAFT), "eagle": (EagleProposer, ToyHead(DRAFT))}


class EachRowAlone(AdaptiveLength):
    """The rule as it stands at first, for each row as if it were alone: the grid's rows are runs beside each other."""

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        return [super(EachRowAlone, self).pays([each], num_drafted)[0] for each in reach]

    def observe(self, decided: Sequence[tuple[int, int]]) -> None:
        pass


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("mutated", [False, True])
def test_joint_distribution_of_drafts_that_end_by_the_rule(name: str, mutated: bool) -> None:
    lengths, (proposer, draft), prompt = set(), PROPOSERS[name], (1, 0)

    def make(source, rule, max_batch_size):
        @Rule
        def recording(distribution, draft, *draws):
            lengths.update(draft.num_proposed.tolist())
            return rule(distribution, looks_at_its_tokens(draft, 0.4) if mutated else draft, *draws)

        proposes = proposer(draft, source, EachRowAlone(COSTS))
        return Decoder(TARGET, proposes, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    found = distance(exact_distribution(make, prompt, 4, GRID), joint_distribution(TARGET, prompt, 4))
    assert found > 0.02 if mutated else found < 1e-12
    assert lengths >= {1, 2}, "some drafts end early"


# -- through the engine ----------------------------------------------------------------------------------------

NUM_DRAWS, SUPPORT, NUM_TOKENS = 1000, 4, 4
RADIUS = radius(NUM_DRAWS, SUPPORT)
EIGHTHS = torch.tensor([[5, 3], [6, 2], [3, 5]]).double() / 8
SAME = FeatureTarget(table(3, EIGHTHS))  # target and draft: so a draft that looks at its tokens errs most
PROMPT = (0, 1, 1, 0, 1, 1, 0)  # something to copy
METHODS: dict[str, dict[str, Any]] = {
    "draft_model": {"draft": SAME},
    "eagle": {"draft": ToyHead(SAME)},
    "hybrid": {"draft": SAME},
    "early_exit": {"exit_layer": 1},
    "ngram": {},
    "suffix": {"max_history_bytes": 1 << 20},
}


def engine_for(method: str, monkeypatch: pytest.MonkeyPatch, max_batch_size: int = 1, draw_s: float = DRAW_S) -> Engine:
    """An engine that drafts as many tokens as are worth verifying, by costs that are given."""
    monkeypatch.setattr("specdec.assembly.target_costs", lambda target, rows, records: COSTS.target_s)
    monkeypatch.setattr("specdec.assembly.draft_cost", lambda *arguments: DRAW_S)
    target: Any = ExitTarget(SAME.table, SAME.table) if method == "early_exit" else SAME
    options = {"num_speculative_tokens": "auto", "max_batch_size": max_batch_size}
    return Engine(target, method=method, **options, **METHODS[method])


def pairs_passing(engine: Engine, temperature: float = 1.0) -> list[bool]:
    """The gate over each pair of neighbouring tokens."""
    params = SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS)
    completions = engine.generate([PROMPT] * NUM_DRAWS, [replace(params, seed=seed) for seed in range(NUM_DRAWS)])
    assert sum(completion.counts.num_accepted for completion in completions) > 0.1 * NUM_DRAWS, "nothing is drafted"
    outputs, truth = [each.token_ids for each in completions], processed_distribution(SAME, params, PROMPT, NUM_TOKENS)
    pairs = [(i, i + 1) for i in range(NUM_TOKENS - 1)]
    return [passes([(output[i], output[j]) for output in outputs], marginal(truth, (i, j)), SUPPORT) for i, j in pairs]


@pytest.mark.parametrize("max_batch_size", [1, 16])
@pytest.mark.parametrize("method", METHODS)
def test_auto_through_the_engine_samples_the_target(
    method: str, max_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fails falsely with probability at most 3e-6; other temperatures for some."""
    temperature = 1.0 if max_batch_size == 1 else 0.5
    assert all(pairs_passing(engine_for(method, monkeypatch, max_batch_size), temperature))


def test_the_gate_sees_a_draft_that_looks_at_its_own_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where chains are drawn, as in a real engine: a token that is left out is drawn again, by the target."""
    likely, rows = 0.6, SAME.table[PROMPT[-1]]  # by the first token, which is not drafted: distributions of the second

    def plants(*arguments: Any, **options: Any) -> Draft:
        return looks_at_its_tokens(draw_chain(*arguments, **options), likely)

    left_out = (rows * (rows < likely)).sum(-1, keepdim=True)
    broken = rows * (rows >= likely) + left_out * rows
    first = joint_distribution(SAME, PROMPT, 1)
    away = sum(first[(a,)] * (broken[a] - rows[a]).abs().sum().item() / 2 for a in range(2))
    assert away > 2 * RADIUS, f"{NUM_DRAWS} draws are too few to see {away}"
    monkeypatch.setattr("specdec.proposers.draft_model.draw_chain", plants)
    assert not pairs_passing(engine_for("draft_model", monkeypatch))[0]


# -- seeds -----------------------------------------------------------------------------------------------------


def emitted(engine: Engine, num_requests: int, seed: int = 0) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=24, seed=seed)
    return [completion.token_ids for completion in engine.generate([PROMPT] * num_requests, params)]


@pytest.mark.parametrize("method", METHODS)
def test_under_auto_each_request_has_uniforms_of_its_own_for_ever(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of drafts tell of earlier uniforms, so none is used again: not by a later call, nor behind `forget`."""
    engine = engine_for(method, monkeypatch)
    outputs = emitted(engine, 2) + emitted(engine, 1)
    engine.forget()
    outputs += emitted(engine, 1) + emitted(engine, 1, seed=1)
    assert len(set(outputs)) == 5, "24 tokens are the same by chance with probability below 1e-3 each"
    assert emitted(engine_for(method, monkeypatch), 2) == outputs[:2], "a fresh engine repeats itself"


def test_under_coupled_verification_a_seed_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the output does not depend on the drafts, so that nothing needs protection."""
    monkeypatch.setattr("specdec.assembly.target_costs", lambda target, rows, records: COSTS.target_s)
    monkeypatch.setattr("specdec.assembly.draft_cost", lambda *arguments: DRAW_S)
    options = {"method": "draft_model", "draft": SAME, "num_speculative_tokens": "auto", "verification": "coupled"}
    assert len({*emitted(Engine(SAME, **options), 2)}) == 1


def test_without_auto_forgetting_begins_the_seeds_again() -> None:
    engine = Engine(SAME, method="suffix", max_history_bytes=1 << 16)
    first, second = emitted(engine, 2)
    engine.forget()
    assert first != second
    assert emitted(engine, 2) == [first, second]
