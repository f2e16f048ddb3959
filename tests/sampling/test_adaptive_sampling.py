"""Adaptive draft lengths above temperature 0 keep the target's distribution, exactly and through the engine.

The rows are asymmetric: with symmetric rows, such as all orders of (2, 1, 1), the biases of a draft whose length
depends on its own tokens would cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.toys import ExitTarget, processed_distribution

from specdec import Engine, SamplingParams
from specdec.conformance.enumeration import exact_distribution, pieces_between
from specdec.conformance.gates import distance, marginal, passes, radius
from specdec.conformance.toys import FeatureTarget, ToyHead, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.costs import MAX_DRAFT_LENGTH, StepCosts
from specdec.models.markov import MarkovModel
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import draw_chain
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.verification import Draft, Rule

# relative to a step of 1 s: another token is not quite worth it after a row of (1, 1) / 2, but is after (3, 1) / 4
DRAW_S = 0.3
COSTS = StepCosts((1.0,) * (MAX_DRAFT_LENGTH + 1), DRAW_S)


def cut_before_unlikely_tokens(draft: Draft, threshold: float) -> Draft:
    """Planted bug: a draft ends before the first token that the draft model finds unlikely."""
    likely = (draft.distribution.prob(draft.tokens) >= threshold).long().cumprod(1).sum(1)
    return replace(draft, num_proposed=torch.minimum(draft.num_proposed, likely))


# -- exactly ---------------------------------------------------------------------------------------------------

DRAFT_ROWS = torch.tensor([[3, 1], [2, 2]]).double() / 4
TARGET_ROWS = torch.tensor([[3, 1], [1, 3], [2, 2], [4, 0]]).double() / 4
TARGET, DRAFT = FeatureTarget(table(3, TARGET_ROWS)), MarkovModel(table(3, DRAFT_ROWS))
GRID = (pieces_between([1 / 2, 3 / 4]), pieces_between([1 / 3, 1 / 2, 2 / 3]), 4)
PROPOSERS: dict[str, Any] = {"draft_model": (DraftModelProposer, DRAFT), "eagle": (EagleProposer, ToyHead(DRAFT))}


class EachRowAlone(AdaptiveLength):
    """The rule in its initial state, for each row as if it were alone: each row of the grid is a run of its own."""

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
            return rule(distribution, cut_before_unlikely_tokens(draft, 0.4) if mutated else draft, *draws)

        proposes = proposer(draft, source, EachRowAlone(COSTS))
        return Decoder(TARGET, proposes, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    found = distance(exact_distribution(make, prompt, 4, GRID), joint_distribution(TARGET, prompt, 4))
    assert found > 0.02 if mutated else found < 1e-12
    assert lengths >= {1, 2}, "some drafts end early"


# -- through the engine ----------------------------------------------------------------------------------------

NUM_DRAWS, SUPPORT, NUM_TOKENS = 1000, 4, 4
RADIUS = radius(NUM_DRAWS, SUPPORT)
EIGHTHS = torch.tensor([[5, 3], [6, 2], [3, 5]]).double() / 8
SAME = FeatureTarget(table(3, EIGHTHS))  # target and draft alike: maximizes the error of the planted bug
PROMPT = (0, 1, 1, 0, 1, 1, 0)  # repetitive, so that there is something to copy
METHODS: dict[str, dict[str, Any]] = {
    "draft_model": {"draft": SAME},
    "eagle": {"draft": ToyHead(SAME)},
    "hybrid": {"draft": SAME},
    "early_exit": {"exit_layer": 1},
    "ngram": {},
    "suffix": {"max_history_bytes": 1 << 20},
}


def engine_for(method: str, monkeypatch: pytest.MonkeyPatch, max_batch_size: int = 1, draw_s: float = DRAW_S) -> Engine:
    """An engine that drafts as many tokens as are worth verifying at fixed costs."""
    monkeypatch.setattr("specdec.assembly.target_costs", lambda target, rows, records: COSTS.target_s)
    monkeypatch.setattr("specdec.assembly.draft_cost", lambda *arguments: DRAW_S)
    target: Any = ExitTarget(SAME.table, SAME.table) if method == "early_exit" else SAME
    options = {"num_speculative_tokens": "auto", "max_batch_size": max_batch_size}
    return Engine(target, method=method, **options, **METHODS[method])


def pairs_passing(engine: Engine, temperature: float = 1.0) -> list[bool]:
    """Whether each pair of neighbouring tokens passes the gate."""
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
    """False-alarm probability at most 3e-6 each; batched runs use another temperature."""
    temperature = 1.0 if max_batch_size == 1 else 0.5
    assert all(pairs_passing(engine_for(method, monkeypatch, max_batch_size), temperature))


def test_the_gate_detects_a_length_that_depends_on_the_drafted_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug is planted where chains are sampled, as in a real engine: the target samples a dropped token again."""
    likely, rows = 0.6, SAME.table[PROMPT[-1]]  # distributions of the second token, by the first, which is not drafted

    def cut_chain(*arguments: Any, **options: Any) -> Draft:
        return cut_before_unlikely_tokens(draw_chain(*arguments, **options), likely)

    dropped = (rows * (rows < likely)).sum(-1, keepdim=True)
    broken = rows * (rows >= likely) + dropped * rows
    first = joint_distribution(SAME, PROMPT, 1)
    bias = sum(first[(a,)] * (broken[a] - rows[a]).abs().sum().item() / 2 for a in range(2))
    assert bias > 2 * RADIUS, f"{NUM_DRAWS} draws are too few to detect {bias}"
    monkeypatch.setattr("specdec.proposers.draft_model.draw_chain", cut_chain)
    assert not pairs_passing(engine_for("draft_model", monkeypatch))[0]


# -- seeds -----------------------------------------------------------------------------------------------------


def emitted(engine: Engine, num_requests: int, seed: int = 0) -> list[tuple[int, ...]]:
    params = SamplingParams(max_tokens=24, seed=seed)
    return [completion.token_ids for completion in engine.generate([PROMPT] * num_requests, params)]


@pytest.mark.parametrize("method", METHODS)
def test_under_auto_no_request_ever_reuses_uniforms(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft lengths reveal earlier uniforms, so none is reused: not by a later call, nor after `forget`."""
    engine = engine_for(method, monkeypatch)
    outputs = emitted(engine, 2) + emitted(engine, 1)
    engine.forget()
    outputs += emitted(engine, 1) + emitted(engine, 1, seed=1)
    assert len(set(outputs)) == 5, "24 tokens are the same by chance with probability below 1e-3 each"
    assert emitted(engine_for(method, monkeypatch), 2) == outputs[:2], "a fresh engine repeats itself"


def test_under_coupled_verification_a_seed_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output does not depend on the drafts there, so seeds need no protection."""
    monkeypatch.setattr("specdec.assembly.target_costs", lambda target, rows, records: COSTS.target_s)
    monkeypatch.setattr("specdec.assembly.draft_cost", lambda *arguments: DRAW_S)
    options = {"method": "draft_model", "draft": SAME, "num_speculative_tokens": "auto", "verification": "coupled"}
    assert len({*emitted(Engine(SAME, **options), 2)}) == 1


def test_without_auto_forget_restarts_the_seeds() -> None:
    engine = Engine(SAME, method="suffix", max_history_bytes=1 << 16)
    first, second = emitted(engine, 2)
    engine.forget()
    assert first != second
    assert emitted(engine, 2) == [first, second]
