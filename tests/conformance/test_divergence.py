"""Greedy outputs that differ at a near tie are distinguished from those that differ by a bug."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import PROMPTS, SUPPORTED, make, reference

from specdec.conformance.divergence import SAFETY, explain, first_difference, last_logits, logit_noise, margin
from specdec.models.causal import CausalLM
from specdec.models.markov import MarkovModel

NEAR, CLEAR = 1e-3, 2.0


def model(margins: float) -> MarkovModel:
    """Token 0, then token 1, lead all distributions, token 1 being this many logits behind."""
    distribution = torch.tensor([3.0, 3.0 - margins, -1.0, -2.0], dtype=torch.float64).softmax(-1)
    return MarkovModel(distribution.expand(4, 4, 4))


class Rounding(MarkovModel):
    """Logits that depend a little on how many tokens are scored together, as in half precision."""

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        logits = super().forward(tokens, cache, first_slot, last_only)
        return logits + torch.tensor([1e-3 * tokens.shape[1], 0, 0, 0])


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_equal_outputs_need_no_explanation() -> None:
    assert explain([1], [0, 0], [0, 0], model(NEAR)) is None


def test_a_near_tie_is_rounding() -> None:
    target = model(NEAR)
    found = explain([1, 2, 3], [0, 0, 1], [0, 0, 0], target, Rounding(target.table))
    assert found is not None
    assert (found.position, found.tokens, found.verdict) == (2, (1, 0), "rounding tie")
    assert found.margin == pytest.approx(NEAR)
    assert found.gap == pytest.approx(NEAR)
    # five tokens in steps of 1, 2, 4 and 8, the last of which is one step of five; the reference adds nothing: 0 to 5
    assert found.noise == pytest.approx(5e-3, rel=1e-6)
    assert "rounding tie: at position 2" in str(found)


def test_a_clear_decision_is_not() -> None:
    target = model(CLEAR)
    found = explain([1, 2, 3], [0, 0, 1], [0, 0, 0], target, Rounding(target.table))
    assert found is not None
    assert (found.verdict, found.gap) == ("bug", pytest.approx(CLEAR))


def test_a_near_tie_of_two_does_not_excuse_a_third() -> None:
    target = model(NEAR)
    found = explain([1, 2, 3], [2], [0], target, Rounding(target.table))
    assert found is not None
    assert found.margin == pytest.approx(NEAR)
    assert (found.verdict, found.gap) == ("bug", pytest.approx(4.0))


def test_an_output_that_ends_is_no_tie() -> None:
    found = explain([1], [0, 0], [0], model(NEAR))
    assert found is not None
    assert (found.verdict, found.tokens) == ("bug", (0, None))


def test_the_last_step_has_the_requested_width() -> None:
    target = model(CLEAR)
    leads = [last_logits(Rounding(target.table), [1] * 100, width) for width in (1, 2, 4, 8)]
    assert [float(lead[0] - lead[1]) - CLEAR for lead in leads] == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3], rel=1e-6)


def test_half_precision_of_a_transformer_is_measured() -> None:
    """Noise in bfloat16 is far above that of float32, and ends within a logit."""
    context = PROMPTS[2] * 3
    narrow = CausalLM(make("llama", SUPPORTED["llama"], torch.bfloat16))
    wide = CausalLM(make("llama", SUPPORTED["llama"]))
    exact = last_logits(wide, context).topk(2)
    lead = float(exact.values[0] - exact.values[1])
    assert SAFETY * logit_noise(wide, context, lead, exact.indices) < 1e-3
    assert 1e-3 < logit_noise(narrow, context, lead, exact.indices) < 1


def test_margin_is_the_lead_where_outputs_part() -> None:
    net = make("llama", SUPPORTED["llama"])
    output = reference(net, PROMPTS[0])
    tokens = torch.tensor([[*PROMPTS[0], *output[:3]]])
    with torch.inference_mode():
        top = net(input_ids=tokens, use_cache=False).logits[0, -1].topk(2).values
    assert margin(CausalLM(net), PROMPTS[0], output, 3) == pytest.approx(float(top[0] - top[1]), abs=1e-4)
