"""Forced acceptance patterns show faults of the rolled-back state that healthy statistics hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny

from specdec import Engine, SamplingParams
from specdec.conformance.mutants import ForgetsRollback
from specdec.conformance.states import PATTERNS, Pattern, StateGap, state_gaps
from specdec.models.base import LanguageModel
from specdec.models.causal import CausalLM

PROMPTS = [[5, 9, 8, 7, 5, 9, 8], [3], [11, 4, 11, 4, 11], [7, 7, 30]]
SAMPLING = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
ROUNDING = 1e-6  # nats; norms are computed in float32 whatever the dtype of the weights
MODEL = CausalLM(tiny.make("llama", tiny.GQA, torch.float64))


class MissesLastAccepted(ForgetsRollback):
    """After a step that kept its whole draft, the last token in the cache is one token stale."""

    def forward(self, tokens: torch.Tensor, cache: Any, first_slot: int = 0, last_only: bool = False) -> torch.Tensor:
        for slot in range(first_slot, first_slot + len(tokens)):
            cached = cache.num_cached[slot]
            if cached and cached == self._written[slot]:
                for layer in cache.layers:
                    layer.keys[slot, :, cached - 1] = layer.keys[slot, :, cached - 2]
            self._written[slot] = cached + tokens.shape[1] if cached else 0  # reading a prompt is no step
        logits: torch.Tensor = self._model.forward(tokens, cache, first_slot, last_only)
        return logits


def gaps(target: LanguageModel, draft: LanguageModel, patterns: Any = PATTERNS) -> list[StateGap]:
    def engine(pattern: Pattern) -> Engine:
        return Engine(
            target, method="draft_model", draft=draft, num_speculative_tokens=3, max_batch_size=2, records=False,
            forced_acceptance=pattern,
        )  # fmt: skip

    return state_gaps(engine, MODEL, PROMPTS, SAMPLING, patterns)


def test_a_sound_engine_has_the_logits_of_a_fresh_reading_under_every_pattern() -> None:
    found = gaps(MODEL, MODEL)
    assert [gap.pattern for gap in found] == list(PATTERNS)
    assert all(gap.largest < ROUNDING and gap.num_tokens == 4 * 24 for gap in found)
    assert found[0].num_accepted == 0 < found[2].num_accepted < found[1].num_accepted


def test_a_cache_without_rollback_is_hidden_by_a_draft_that_is_always_accepted() -> None:
    """Draft and target are one model: nothing is ever rejected, and the outputs are right to the last token."""
    broken = ForgetsRollback(MODEL)
    options = {"method": "draft_model", "draft": MODEL, "num_speculative_tokens": 3, "records": False}
    healthy = Engine(broken, **options).generate(PROMPTS, SAMPLING)
    assert [each.token_ids for each in healthy] == [
        each.token_ids for each in Engine(MODEL, **options).generate(PROMPTS, SAMPLING)
    ]
    assert all(each.counts.num_accepted == each.counts.num_drafted > 0 for each in healthy)
    by_pattern = {gap.pattern: gap.largest for gap in gaps(broken, MODEL)}
    assert by_pattern["all"] < ROUNDING
    assert all(by_pattern[pattern] > 0.1 for pattern in PATTERNS if pattern != "all")


def test_a_fault_after_full_acceptance_is_hidden_by_a_draft_that_is_never_accepted() -> None:
    by_pattern = {gap.pattern: gap.largest for gap in gaps(MissesLastAccepted(MODEL), MODEL)}
    assert by_pattern["none"] < ROUNDING
    assert by_pattern["all"] > 0.01


def test_a_gap_says_where_it_is() -> None:
    (gap,) = gaps(ForgetsRollback(MODEL), MODEL, ["none"])
    assert 0 <= gap.prompt < len(PROMPTS)
    assert 2 <= gap.place < 24  # the first step after a rejection is the earliest


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_every_number_of_accepted_tokens_is_visited(count: int) -> None:
    (gap,) = gaps(MODEL, MODEL, [(count,)])
    assert gap.largest < ROUNDING
    assert (gap.num_accepted > 0) == (count > 0)
