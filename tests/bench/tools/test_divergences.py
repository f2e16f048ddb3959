"""Outputs that a run found to part are made again and explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.tools import divergences
from specdec.models.markov import MarkovModel

DISTRIBUTION = torch.tensor([3.0, 1.0, -1.0, -2.0], dtype=torch.float64).softmax(-1)


class Recorded(divergences.Engines):
    """Engines whose outputs are known; a target that prefers token 0 to token 1 by 2 logits."""

    def __init__(self, outputs: dict[tuple[str, str], list[int]]) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.outputs, self.dtype, self.model = (
            outputs,
            torch.float64,
            lambda dtype: MarkovModel(DISTRIBUTION.expand(4, 4, 4)),
        )

    def output(self, name: str, method: str, gamma: Any, prompt: Any, max_tokens: int) -> list[int]:
        self.asked.append((name, method, gamma, list(prompt), max_tokens))
        return self.outputs[name, method]


def record(**given: Any) -> dict[str, Any]:
    names = {"engine": "vllm", "method": "ngram", "gamma": 3, "reference_engine": "specdec", "max_tokens": 4}
    return {**names, "first_difference_at": [None, 2], **given}


def test_only_prompts_that_parted_are_decoded_again() -> None:
    engines = Recorded({("specdec", "autoregressive"): [0, 0, 0, 0], ("vllm", "ngram"): [0, 0, 1, 0]})
    records = [record(), record(first_difference_at=None), record(first_difference_at=[None, None])]
    (found,) = divergences.partings(records, [[1], [2, 3]], engines)
    assert engines.asked == [("specdec", "autoregressive", 0, [2, 3], 4), ("vllm", "ngram", 3, [2, 3], 4)]
    assert (found.engine, found.method, found.gamma, found.prompt, found.position) == ("vllm", "ngram", 3, 1, 2)
    assert found.divergence is not None
    assert found.divergence.gap == pytest.approx(2)
    assert divergences.line(found) == "| vllm | ngram 3 | 1 | 2 | 2 | 1 / 0 | 2 | 2 | 0 | bug |"


def test_outputs_that_are_equal_now_are_reported_as_equal() -> None:
    engines = Recorded({("specdec", "autoregressive"): [0, 0], ("vllm", "ngram"): [0, 0]})
    (found,) = divergences.partings([record()], [[1], [2, 3]], engines)
    assert found.divergence is None
    assert divergences.line(found) == "| vllm | ngram 3 | 1 | 2 | - | - | - | - | - | equal this time |"
