"""Record fields on acceptance, from counts worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.bench_runs import decoded, loaded, printed

from bench.analysis.acceptance import drifting, groups, num_tested
from bench.engines.base import PromptResult
from bench.measure import acceptance
from bench.records.intervals import length_interval, rate_interval
from bench.records.results import of_records
from bench.report.acceptance import parts
from bench.report.document import Table
from bench.workloads.base import Prompt, turns_of
from specdec import AcceptanceCounts


def result(*steps: tuple[int, int, int], prefill: int = 1) -> PromptResult:
    """steps: (drafted, accepted, emitted) of each."""
    counts = AcceptanceCounts()
    for step in steps:
        counts.add_step(*step)
    emitted = tuple(step[2] for step in steps)
    return PromptResult(tuple(range(prefill + sum(emitted))), 0.1, 1.0, counts, "length", step_tokens=emitted)


FIRST = result((2, 2, 3), (2, 1, 2), (2, 0, 1), (2, 0, 1))
SECOND = result((2, 2, 3), (2, 2, 3), (2, 1, 2))


def test_totals_and_intervals_by_hand() -> None:
    """Seven steps, of which five accept the first draft token and three of these the second."""
    record = acceptance.of_results([FIRST, SECOND], "per_prompt")
    assert record["acceptance_rate"] == 8 / 14
    assert record["mean_acceptance_length"] == 15 / 7
    assert record["acceptance_rate_at"] == [5 / 7, 3 / 7]
    assert record["conditional_acceptance_rate_at"] == [5 / 7, 3 / 5]
    assert record["acceptance_histogram"] == [2, 2, 3]
    assert record["per_prompt_steps"] == [4, 3]
    assert record["per_prompt_emitted"] == [7, 8]
    assert record["per_prompt_drafted"] == [8, 6]
    assert record["per_prompt_accepted"] == [3, 5]
    for name, interval in {
        "acceptance_rate": rate_interval([3, 5], [8, 6]),
        "mean_acceptance_length": length_interval([7, 8], [4, 3]),
    }.items():
        assert interval is not None
        assert (record[f"{name}_low"], record[f"{name}_high"]) == (interval.low, interval.high)
    second = rate_interval([1, 2], [2, 3])  # of the steps that accepted the first position
    assert second is not None
    assert record["conditional_acceptance_rate_at_low"][1] == second.low
    second = rate_interval([1, 2], [4, 3])
    assert second is not None
    assert record["acceptance_rate_at_high"][1] == second.high


def test_turns_and_repeated_prompts_belong_to_one_conversation() -> None:
    first, other = Prompt("How?", later=("Why?",)), Prompt("Who?")
    encoded = [(prompt, (1,)) for prompt in (*turns_of(first), other, replace(other, category="qa"), first)]
    assert acceptance.conversations(encoded) == [0, 0, 1, 1, 0]
    record = acceptance.by_text(encoded, [FIRST, SECOND, FIRST, SECOND, None], "per_request")
    assert record["per_request_conversation"] == [0, 0, 1, 1, 0]
    assert record["per_request_turn"] == [1, 2, 1, 1, 1]


def test_intervals_are_over_conversations_by_hand() -> None:
    """Two conversations of two turns each: as two prompts with the sums of their counts."""
    record = acceptance.of_results([FIRST, SECOND, None, FIRST], "per_request", [0, 0, 1, 1])
    assert record["per_request_drafted"] == [8, 6, None, 8]
    expected = rate_interval([8, 3], [14, 8])
    length = length_interval([15, 7], [7, 4])
    assert expected is not None
    assert length is not None
    assert (record["acceptance_rate_low"], record["acceptance_rate_high"]) == (expected.low, expected.high)
    assert (record["mean_acceptance_length_low"], record["mean_acceptance_length_high"]) == (length.low, length.high)


def test_an_engine_without_counts_has_no_acceptance() -> None:
    silent = PromptResult((1, 2, 3), 0.1, 1.0, None, "length")
    record = acceptance.of_results([FIRST, silent], "per_prompt")
    assert record.pop("acceptance_reason") == "the engine does not report them"
    assert set(record.values()) == {None}
    silent = replace(silent, why_no_counts="several steps arrived together")
    record = acceptance.of_results([FIRST, silent], "per_prompt")
    assert record["acceptance_reason"] == "several steps arrived together"
    assert acceptance.of_results([FIRST], "per_prompt")["acceptance_reason"] is None
    text = acceptance.by_text([(Prompt("a"), (1,)), (Prompt("b"), (1,))], [silent, silent], "per_prompt")
    assert text["text_drift"] is text["acceptance_length_over_text"] is None


def test_unfinished_requests_have_no_counts() -> None:
    record = acceptance.of_results([FIRST, None], "per_request")
    assert record["per_request_accepted"] == [3, None]
    assert record["acceptance_rate"] == 3 / 8
    assert record["acceptance_rate_low"] is None  # a single request


def test_the_end_of_a_text_is_left_out() -> None:
    """With two drafts, a step of the last three tokens may have been cut, or kept from a full draft.

    The texts have 8 and 9 tokens, so steps must end by 5 and 6. The prompts have 10 and 14 tokens: steps of 3 tokens
    begin at 11 and 15, and at 14 one of 2 that ends at 6 of 8 tokens is out.
    """
    record = acceptance.by_text([(Prompt("a"), (7,) * 10), (Prompt("b"), (7,) * 14)], [FIRST, SECOND], "per_prompt")
    assert record["text_bin_tokens"] == 2  # 15 // 2 = 7 is the last of eight bins
    assert record["acceptance_length_over_text"] == [None] * 5 + [3.0, None, 3.0]
    assert record["per_prompt_length"] == [10, 14]
    assert record["text_drift"] is None  # one step of each text has no slope


def test_drift_within_texts() -> None:
    """Four steps of 1, 1, 2 and 2 tokens, then one that is left out: slope 2 / 5, the same in all eight texts."""
    rising = result((1, 0, 1), (1, 0, 1), (1, 1, 2), (1, 1, 2), (1, 1, 2))
    encoded = [(Prompt("a", "code", earlier=(f"before {number}",)), (1, 2)) for number in range(8)]
    record = acceptance.by_text(encoded, [rising] * 8, "per_prompt")
    assert record["text_drift"] == pytest.approx(2 / 5)
    assert record["text_drift_p_value"] == 2 / 256
    assert record["per_prompt_category"] == ["code"] * 8
    assert record["per_prompt_turn"] == [2] * 8
    assert [name for _, name in drifting([record])] == ["text_drift"]
    plain = result(*[(0, 0, 1)] * 5)
    assert acceptance.by_text(encoded, [plain] * 8, "per_prompt")["text_drift_p_value"] is None


def test_acceptance_over_the_time_of_service() -> None:
    """Requests at 0, 4 and 9 of 10 s; the one at 6 did not finish. The last belongs to the last tenth."""
    good, bad = result((1, 1, 2), (1, 1, 2)), result((1, 0, 1), (1, 0, 1))
    record = acceptance.over_service([0.0, 4.0, 6.0, 9.99], [good, good, None, bad], 10.0)
    lengths = record["acceptance_length_over_service"]
    assert [lengths[part] for part in (0, 4, 9)] == [2.0, 2.0, 1.0]
    assert lengths.count(None) == 7
    assert record["service_drift"] < 0
    assert record["service_drift_p_value"] > 0.3  # three requests
    plain = result((0, 0, 1))
    assert set(acceptance.over_service([0.0, 1.0, 2.0], [plain] * 3, 10.0).values()) == {None}


def grouped_cell(**changes: Any) -> dict[str, Any]:
    columns = {"category": ["a", "b", "a"], "turn": [1, 2, 2], "steps": [4, 3, 4], "emitted": [7, 8, 5]}
    columns |= {"drafted": [8, 6, 8], "accepted": [3, 5, 1]}
    return decoded("ngram", 2) | {f"per_prompt_{name}": column for name, column in columns.items()} | changes


def test_groups_by_category_and_turn() -> None:
    first, second = groups(grouped_cell(), "category")
    assert (first.value, first.num_prompts) == ("a", 2)
    assert first.acceptance_rate == rate_interval([3, 1], [8, 8])
    assert second.mean_acceptance_length == length_interval([8], [3])
    assert [(each.value, each.num_prompts) for each in groups(grouped_cell(), "turn")] == [("1", 1), ("2", 2)]
    assert groups(grouped_cell(per_prompt_turn=[1, 1, 1]), "turn") == []
    assert groups(decoded("ngram", 2), "category") == []
    assert groups(grouped_cell(num_drafted=0), "category") == []


def test_the_report_shows_groups_positions_and_drift() -> None:
    by_position = {"acceptance_rate_at": [0.5, 0.25], "conditional_acceptance_rate_at": [0.5, 0.5]}
    by_position |= {f"{name}_{end}": [0.125, None] for name in by_position for end in ("low", "high")}
    drift = {"text_drift": -0.0125, "text_drift_p_value": 0.0078125}
    record = grouped_cell(**by_position, acceptance_histogram=[5, 3, 2], **drift)
    run = of_records([record, decoded("ngram", 4, text_drift=0.0, text_drift_p_value=0.5, speedup=1.0)])
    positions, categories, turns, sentence, drifts = (part for part in parts(run) if part)
    assert isinstance(positions, Table)
    assert positions.rows[0][3:] == ("1", "50.0% [12.5%, 12.5%]", "50.0% [12.5%, 12.5%]", "3")
    assert positions.rows[1][3:] == ("2", "25.0%", "50.0%", "2")
    assert isinstance(categories, Table)
    assert isinstance(turns, Table)
    assert [row[3:5] for row in categories.rows] == [("a", "2"), ("b", "1")]
    assert categories.rows[1][5:] == ("83.3%", "2.67")
    assert [row[3:5] for row in turns.rows] == [("1", "1"), ("2", "2")]
    expected = "Drift of the acceptance length: specdec ngram 2 within a text"
    assert sentence == f"{expected} (2 tests, each with a false-alarm rate of 1%)."
    assert isinstance(drifts, Table)
    assert drifts.rows[0][3:] == ("-1.250", "0.0078")
    assert max(map(len, printed([record]))) <= 80


def test_requests_are_grouped_and_tested_too() -> None:
    columns = {"category": ["a", "b", "a"], "steps": [4, None, 4], "emitted": [7, None, 5]}
    columns |= {"drafted": [8, None, 8], "accepted": [3, None, 1]}
    record = loaded(2.0, "ngram", 2) | {f"per_request_{name}": column for name, column in columns.items()}
    assert groups(record, "category") == []  # only requests of one category finished
    record |= {"service_drift_p_value": 0.001, "text_drift_p_value": None}
    assert [name for _, name in drifting([record])] == ["service_drift"]
    assert num_tested([record]) == 1
