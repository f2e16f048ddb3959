"""Engines compared at their best, from records computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.bench_runs import decoded, printed, row_of

from bench.analysis.engine_ratios import leads


def record(engine: str, method: str, gamma: int, latency_s: list[float], **arms: list[float]) -> dict[str, Any]:
    """A cell of prompts with ten tokens each; arms: latencies of the baseline and the reference beside it."""
    cell: dict[str, Any] = {"engine": engine, "method": method, "gamma": gamma, "reference_engine": "specdec"}
    cell |= {"batch_size": 1, "per_prompt_latency_s": latency_s, "per_prompt_tokens": [10] * len(latency_s)}
    for arm in ("baseline", "reference"):
        cell[f"{arm}_per_prompt_latency_s"] = arms.get(arm)
        cell[f"{arm}_per_prompt_tokens"] = [10] * len(arms[arm]) if arm in arms else None
    return cell | {"speedup": arms["baseline"][0] / latency_s[0] if "baseline" in arms else None}


# each cell ran at another time, when the machine was slower or faster: only ratios inside a cell mean anything
RECORDS = [
    record("specdec", "autoregressive", 0, [1.0, 1.0]),
    record("specdec", "ngram", 2, [1.0, 1.0], baseline=[1.2, 1.2]),
    record("specdec", "hybrid", 4, [7.0, 7.0], baseline=[14.0, 14.0]),
    record("vllm", "autoregressive", 0, [6.0, 6.0], reference=[2.0, 2.0]),
    record("vllm", "ngram", 2, [1.0, 1.0], baseline=[1.5, 1.5], reference=[5.0, 5.0]),
    record("vllm", "ngram", 4, [1.0, 1.0], baseline=[1.1, 1.1], reference=[5.0, 5.0]),
]


def test_ratios_are_chained_through_paired_measurements() -> None:
    found = [(lead.record["method"], lead.other["method"], lead.other["gamma"]) for lead in leads(RECORDS)]
    assert found == [
        ("autoregressive", "autoregressive", 0),
        ("hybrid", "autoregressive", 0),
        ("hybrid", "ngram", 2),
    ]
    assert [lead.times.estimate for lead in leads(RECORDS)] == pytest.approx([3, 2 * 3, 2 * 3 / 1.5])


def test_rounds_are_paired_and_give_the_interval() -> None:
    """Round by round 4 and 9 times, so 6 in the geometric mean; the two factors alone are 2, 3 and 2, 3. The logarithms
    have a standard error of log(9 / 4) / 2 = log 1.5, with one degree of freedom.
    """
    records = [
        record("specdec", "autoregressive", 0, [1.0, 1.0]),
        record("specdec", "ngram", 2, [1.0, 1.0], baseline=[2.0, 3.0]),
        record("vllm", "autoregressive", 0, [2.0, 3.0], reference=[1.0, 1.0]),
    ]
    times = leads(records)[1].times
    assert (times.estimate, times.low, times.high) == pytest.approx((6, 6 * 1.5**-12.7062, 6 * 1.5**12.7062), rel=1e-4)


def test_a_batch_is_one_round() -> None:
    records = [each | {"batch_size": 2} for each in RECORDS]
    assert leads(records)[0].times.low is None


def test_without_another_engine_or_its_plain_decoding_there_are_no_ratios() -> None:
    assert leads(RECORDS[:3]) == []
    assert leads([*RECORDS[:3], *RECORDS[4:]]) == []
    assert leads(RECORDS[3:]) == []
    alone = [{**RECORDS[3], "reference_per_prompt_latency_s": None}]
    assert leads([*RECORDS[:3], *alone]) == []


def test_the_rows_that_the_terminal_prints() -> None:
    lines = printed([decoded(each["method"]) | each for each in RECORDS])
    rows = lines[lines.index("Engines against each other:") :]
    best = row_of(rows, "specdec", "hybrid", "4", "vllm", "autoregressive")
    assert best[5:] == ["6.00", "[6.00,", "6.00]"]
    assert row_of(rows, "specdec", "hybrid", "4", "vllm", "ngram", "2")[6:] == ["4.00", "[4.00,", "4.00]"]
