"""Drafts that end where another token would not pay: when they do, and that the law stays the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from gates import distance
from oracle import exact_law
from toys import QUARTERS, FeatureTarget, ToyHead, grid_pair, joint_law, table

from specdec import Engine, SamplingParams
from specdec.adaptive import MOST, AdaptiveLength, StepCosts, confidence, target_costs
from specdec.decoding import Decoder
from specdec.models.markov import MarkovModel
from specdec.proposers.eagle import EagleProposer

SURE = torch.cat([QUARTERS, torch.eye(3, dtype=torch.float64)])  # some rows leave no doubt
HALVES = QUARTERS[3:]  # such that a grid of two points will do for accepting and for the last token
FREE = StepCosts((1.0,), 0.0)


class WhileSure(AdaptiveLength):
    """Goes on only behind tokens that the draft had no doubt about."""

    def pays(self, reach: Sequence[float], num_drafted: int) -> list[bool]:
        return [each > 0.6 for each in reach]


@pytest.mark.parametrize("mutated", [False, True])
def test_joint_law_of_drafts_that_end_early(mutated: bool) -> None:
    """Exactly, while rows end their drafts at different places; the mutant ends them by looking at the token drawn."""
    target, draft = FeatureTarget(table(0, HALVES)), MarkovModel(table(10, SURE))
    lengths = set()

    def make(source, rule, max_batch_size):
        def recording(law, draft, *draws):
            lengths.update(draft.lengths.tolist())
            if mutated and draft.tokens.shape[1]:
                unwanted = draft.tokens.gather(1, (draft.lengths - 1).clamp(min=0)[:, None])[:, 0] == 0
                draft = replace(draft, lengths=(draft.lengths - unwanted.long()).clamp(min=0))
            return rule(law, draft, *draws)

        proposer = EagleProposer(ToyHead(draft), source, WhileSure(FREE))
        return Decoder(target, proposer, 2, max_batch_size=max_batch_size, rule=recording, uniforms=source)

    prompt, num_tokens = (0, 1), 4
    law = exact_law(make, prompt, num_tokens, (4, 2, 2))
    found = distance(law, joint_law(target, prompt, num_tokens))
    assert found > 0.01 if mutated else found < 1e-12
    assert lengths >= {1, 2}


def test_the_rule() -> None:
    """A step of one second for any width, a draft token for a tenth: three of five are accepted at first."""
    adaptive = AdaptiveLength(StepCosts((1.0,) * (MOST + 1), 0.1))
    assert adaptive.pays([1.0, 0.17, 0.16], 0) == [True, True, True]
    alone = [adaptive.pays([reach], 1)[0] for reach in (0.17, 0.16)]
    assert alone == [True, False], "0.1 s must bring 0.1 tokens: 0.6 times 1/6"
    for _ in range(300):
        adaptive.observe([(4, 0)])
    assert not adaptive.pays([1.0], 0)[0], "nothing is ever accepted"
    for _ in range(300):
        adaptive.observe([(0, 0)])
    assert adaptive.pays([1.0], 0)[0], "it is tried again"
    for _ in range(300):
        adaptive.observe([(4, 4)])
    assert not adaptive.pays([0.3], 4)[0], "five tokens in 1.4 s are the rate to beat"
    assert adaptive.pays([0.6], 4)[0]


def test_confidence_is_the_largest_probability() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(confidence(logits), logits.softmax(-1).amax(-1))
    assert confidence(torch.tensor([[0.0, -torch.inf]])).item() == 1


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_auto_through_the_engine(method: str, max_batch_size: int) -> None:
    """Greedy output is plain decoding's; a draft that is the target is followed far."""
    target = FeatureTarget(grid_pair(1)[0].table)
    draft = ToyHead(target) if method == "eagle" else target
    options = {"num_speculative_tokens": "auto", "max_batch_size": max_batch_size}
    engine = Engine(target, method=method, draft=draft, **options)
    prompts, params = [[0, 1, 2], [2], [1, 1]], SamplingParams(temperature=0, max_tokens=30)
    plain = Engine(target).generate(prompts, params)
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert all(c.counts.num_accepted == c.counts.num_drafted for c in completions)
    assert {step.num_drafted for c in completions for step in c.steps} <= set(range(MOST + 1))


def test_costs_are_measured_for_every_width() -> None:
    costs = target_costs(grid_pair(1)[0], rows=2)
    assert len(costs) == MOST + 1
    assert min(costs) > 0
