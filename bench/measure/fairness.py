"""Conditions for a fair comparison of arms, and where their greedy outputs diverge."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bench.engines.base import BenchEngine, PromptResult, Run
from specdec.conformance.divergence import first_difference, margin
from specdec.models.base import LanguageModel


def check_terms(engines: Mapping[str, BenchEngine], dtype: str) -> None:
    """Assert that engines, by name, have this dtype and the same stop tokens."""
    for name, engine in engines.items():
        assert engine.dtype == dtype, f"engine={name} must have dtype={dtype}, but has {engine.dtype}"
    stops = {name: sorted(engine.stop_token_ids) for name, engine in engines.items()}
    assert len(set(map(str, stops.values()))) <= 1, f"engines must end at the same tokens, but {stops} differ"


def check_ends(runs: Sequence[Run], stop_token_ids: Collection[int], max_tokens: int) -> None:
    """Assert that every output ended at its first stop token, else after `max_tokens`."""
    for result in (result for run in runs for result in run.results):
        ends = [index for index, token in enumerate(result.token_ids, 1) if token in stop_token_ids]
        expected = (ends[0], "stop") if ends else (max_tokens, "length")
        found = (len(result.token_ids), result.finish_reason)
        assert found == expected, f"an output must end after {expected}, but ended after {found}"


def differences(candidate: Sequence[Run], reference: Sequence[Run]) -> list[int | None]:
    """The position at which the outputs of two arms diverge, for each prompt; None if they are equal."""
    pairs = zip(_results(candidate), _results(reference), strict=True)
    return [first_difference(result.token_ids, expected.token_ids) for result, expected in pairs]


def margins(
    target: LanguageModel, prompts: Sequence[Sequence[int]], reference: Sequence[Run], positions: Sequence[int | None]
) -> list[float | None]:
    """The target's margin where a candidate diverges from the reference, for each prompt; None where it does not."""
    rows = zip(prompts, _results(reference), positions, strict=True)
    return [
        None if position is None else margin(target, prompt, result.token_ids, position)
        for prompt, result, position in rows
    ]


def _results(runs: Sequence[Run]) -> list[PromptResult]:
    return [result for run in runs for result in run.results]
