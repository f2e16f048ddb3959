"""The table of planted bugs: on toys here, on the default pair in the committed one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.audited import DRAFT, PROMPTS, TARGET

from bench.tools import detection_power
from specdec import SamplingParams
from specdec.conformance.mutants import maker
from specdec.conformance.reference import Reference
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens


def judge(
    name: str, params: SamplingParams = detection_power.SAMPLED, num_draws: int = 6000, share: float = 1
) -> detection_power.Finding:
    decoder, sound = (
        plant(TARGET, DRAFT, 3)(uniforms, verify_tokens, detection_power.ROWS)
        for plant in (detection_power.PLANTED[name], maker)
    )
    references = [Reference(model, params) for model in (TARGET, DRAFT)]
    prompts = [tuple(prompt) for prompt in PROMPTS]
    return detection_power.judge(name, decoder, references, prompts, num_draws, 0.25, sound, share)


def test_the_sound_engine_is_innocent_by_all_its_tokens() -> None:
    found = judge("none")
    assert (found.found_by, found.errors, found.num_draws, found.tv_lower_bound) == ({}, (), 6000, 0)
    assert found.p_value > 1e-6
    assert detection_power.line(found).startswith("| none | T = 1, 3 prompts | 0.250 | no (p = ")


def test_judging_ends_where_a_bug_is_found() -> None:
    found = judge("M3 accept always")
    assert found.found_by
    assert found.num_draws < 6000
    first = min(found.found_by, key=found.found_by.get)
    assert f"| {first} after {found.found_by[first]}" in detection_power.line(found)


def test_speculation_that_is_off_shows_in_the_counts_only() -> None:
    """Its outputs are right to the last token, so that only the counts keep an audit from calling it lossless."""
    found = judge("M13 speculation silently off", num_draws=1024)
    assert (found.found_by, found.errors, found.num_draws) == ({}, (), 1024)
    assert "| by counts: speculation not confirmed: no token was drafted; " in detection_power.line(found)
    assert not judge("none", num_draws=1024).unconfirmed


def test_a_mutant_that_acts_in_a_quarter_of_the_batches_is_a_quarter_as_large() -> None:
    whole, quarter = (judge("M3 accept always", share=share) for share in (1, 1 / 4))
    assert whole.found_by
    assert quarter.num_draws > whole.num_draws
    assert (whole.size, quarter.size) == (0.25, 0.0625)
    assert "| T = 1, 3 prompts, in 0.25 of the batches | 0.062 |" in detection_power.line(quarter)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("M21 counts after the end", "tokens were counted, but"),
        ("M22 constant log-probability", "log-probability 0 at position"),
        ("M22 log-probability of the draft", "log-probability -"),
    ],
)
def test_what_is_reported_wrongly_is_found_by_name(name: str, error: str) -> None:
    params = replace(detection_power.SAMPLED, logprobs=name.startswith("M22"), stop_token_ids=(0,))
    assert error in judge(name, params, 1500).errors[0]
    assert not judge("none", params, 1500).errors


def test_greedy_prompts_are_used_once_and_the_sampling_is_recorded() -> None:
    found = judge("M11 soft greedy", replace(detection_power.SAMPLED, temperature=0.0))
    assert found.sampling == {"temperature": 0.0}
    assert found.num_draws <= 3 * detection_power.SAMPLED.max_tokens
    assert "| temperature 0, 3 prompts | 0.250 | by name: output of prompt " in detection_power.line(found)


def test_sizes_are_means_over_tokens() -> None:
    references = [Reference(model, SamplingParams()) for model in (TARGET, DRAFT)]
    outputs = [[1, 2, 3], [4], [5, 0]]
    found = detection_power.sizes(references, PROMPTS, outputs)
    distances = [
        float((TARGET.table[a, b] - DRAFT.table[a, b]).abs().sum() / 2)
        for a, b in [(1, 2), (2, 1), (1, 2), (0, 3), (0, 2), (2, 5)]
    ]
    assert found["M3 accept always"] == pytest.approx(sum(distances) / 6, abs=1e-6)
    assert found["M5 accept at equality"] == 0


def test_stop_tokens_are_shown_by_their_number() -> None:
    found = replace(judge("none", num_draws=64), sampling={"stop_token_ids": (1, 2)}, size=None)
    assert detection_power.line(found).startswith("| none | stop_token_ids 2, 3 prompts |  | no")
