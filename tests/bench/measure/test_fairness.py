"""Engines are compared on equal terms, and the first difference of greedy outputs is reported."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.catalogue.pairs import catalogue
from bench.engines.base import LoadOptions, PromptResult, Run
from bench.engines.registry import load
from bench.measure.fairness import check_ends, check_terms, differences, first_difference, margins


def run(*tokens: int, finish_reason: str = "length") -> Run:
    return Run((PromptResult(tokens, 0.5, 1.0, None, finish_reason),))


def engine(dtype: str = "float32", stops: frozenset[int] = frozenset({2})) -> Any:
    return SimpleNamespace(dtype=dtype, stop_token_ids=stops)


def test_another_dtype_or_stop_rule_is_detected() -> None:
    check_terms({"a": engine(), "b": engine()}, "float32")
    with pytest.raises(AssertionError, match="engine=b must have dtype=float32, but has bfloat16"):
        check_terms({"a": engine(), "b": engine("bfloat16")}, "float32")
    with pytest.raises(AssertionError, match=r"must end at the same tokens, but .*'b': \[2, 3\]"):
        check_terms({"a": engine(), "b": engine(stops=frozenset({3, 2}))}, "float32")


@pytest.mark.parametrize(
    ("output", "holds"),
    [
        (run(1, 1, 1), True),
        (run(1, 2, finish_reason="stop"), True),
        (run(1, 1, 2, finish_reason="stop"), True),
        (run(1, 1), False),  # too short
        (run(1, 1, 2), False),  # the last token is a stop token
        (run(2, 1, 1), False),  # continued after one
        (run(1, 1, finish_reason="stop"), False),  # stopped at something else
        (run(1, 1, 1, 1), False),
    ],
)
def test_outputs_end_by_the_stop_rules(output: Run, holds: bool) -> None:
    if holds:
        check_ends([output], {2}, 3)
        return
    with pytest.raises(AssertionError, match="an output must end after"):
        check_ends([output], {2}, 3)


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert differences([run(1, 2), run(3)], [run(1, 2), run(4)]) == [None, 0]


def test_the_margin_is_that_of_the_target_where_outputs_part() -> None:
    target = load("specdec", catalogue()["tiny-random"], LoadOptions("float32", "cpu")).target  # type: ignore[attr-defined]
    prompt, output = (5, 6, 7), run(8, 9, 10)
    found = margins(target, [prompt, prompt], [output, output], [None, 2])
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    distribution = target.forward(tokens, target.allocate(1, 5))[0, -1].log_softmax(-1).sort(descending=True).values
    assert found[0] is None
    assert found[1] == pytest.approx(float(distribution[0] - distribution[1]), abs=1e-5)
