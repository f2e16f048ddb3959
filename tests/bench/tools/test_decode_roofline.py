"""Ratios of decode steps to the roofline, from known times."""

from __future__ import annotations

import pytest

from bench.tools.decode_roofline import BLOCK_BYTES, line, summary


def test_ratios_are_medians_over_the_rounds() -> None:
    block_s = [1.0, 2.0, 1.0]
    times = {"bfloat16": {1: [0.8, 1.6, 4.0], 4: [1.0, 2.0, 1.0]}, "q8_0": {1: [0.4, 0.8, 0.4], 4: [0.8, 1.0, 0.8]}}
    rows = summary(block_s, times, {"bfloat16": BLOCK_BYTES // 2, "q8_0": BLOCK_BYTES // 4})
    assert [(row["weights"], row["width"]) for row in rows] == [
        ("bfloat16", 1), ("bfloat16", 4), ("q8_0", 1), ("q8_0", 4)
    ]  # fmt: skip
    assert [row["roofline_share"] for row in rows] == pytest.approx([0.625, 0.5, 0.625, 0.3125])
    assert [row["speedup"] for row in rows] == pytest.approx([1, 1, 2, 1.25])
    assert [row["relative_cost"] for row in rows] == pytest.approx([1, 1.25, 1, 2])
    assert rows[0]["read_bandwidth"] == BLOCK_BYTES


def test_a_line_states_what_was_measured() -> None:
    row = {"weights": "q8_0", "width": 2, "step_s": 0.0042, "roofline_share": 0.78, "read_bandwidth": 2.2e10}
    row |= {"speedup": 1.71, "relative_cost": 1.1}
    assert line(row) == (
        "q8_0, 2 tokens: 4.20 ms, 78% of the roofline at 22.0 GB/s, 1.71 times as fast as bfloat16, "
        "1.10 times the first width"
    )
