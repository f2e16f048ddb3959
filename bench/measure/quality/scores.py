"""The quality of outputs by the workload's own score, and how speculation changes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import Pair
from bench.engines.base import Run
from bench.measure.paired import BASELINE, CANDIDATE
from bench.measure.quality import sandbox
from bench.records.intervals import Interval, mean_difference_interval
from bench.records.schema import Record
from bench.workloads.base import Cases, Formula, Number, Prompt, Summary, UnitTest
from bench.workloads.scoring import formulas, programs
from bench.workloads.scoring.extraction import final_number
from specdec.texts import continuation

METRICS = {
    Number: "exact_match",
    Formula: "exact_match",
    UnitTest: "pass_at_1",
    Cases: "pass_at_1",
    Summary: "rouge_1",
}
LIMITS, CASE_LIMITS = sandbox.Limits(), sandbox.Limits(cpu_s=6)  # of a case as in LiveCodeBench's own evaluation


def of_run(
    config: BenchConfig, pair: Pair, prompts: Sequence[Prompt], runs: Mapping[str, Sequence[Run]], tokenizer: Any
) -> Record:
    """The fields of a record: the candidate's score and plain decoding's, or why there is none.

    runs: of each arm, as `bench.measure.paired` names them.
    """
    metric = metric_of(prompts)
    if metric is None:
        return no_quality(None, None)
    if reason := _why_none(config, pair, metric) or _why_no_formulas(prompts):
        return no_quality(metric, reason)
    outputs = {arm: texts(of_arm, tokenizer) for arm, of_arm in runs.items()}
    try:
        return compare(metric, prompts, outputs[CANDIDATE], outputs.get(BASELINE))
    except sandbox.SandboxError as error:  # keep the measurement without a score
        return no_quality(metric, f"code could not be run: {error}")


def _why_none(config: BenchConfig, pair: Pair, metric: str) -> str | None:
    if pair.load_format == "dummy":
        return f"pair={pair.name} has random weights, whose output means nothing"
    if config.prescribes_acceptance:
        return "acceptance was prescribed, so the output is not the model's"
    if metric == "pass_at_1" and not config.allow_code_execution:
        return "code that a model wrote is run only with --allow-code-execution"
    return None


def _why_no_formulas(prompts: Sequence[Prompt]) -> str | None:
    return formulas.why_not() if any(isinstance(prompt.truth, Formula) for prompt in prompts) else None


def texts(runs: Sequence[Run], tokenizer: Any) -> list[str]:
    """Each prompt's output as a continuation, without special tokens but with leading spaces."""
    outputs = [result.token_ids for run in runs for result in run.results]
    if tokenizer is None:
        return [bytes(token % 256 for token in tokens).decode(errors="replace") for tokens in outputs]
    return [continuation(tokenizer, tokens) for tokens in outputs]


def metric_of(prompts: Sequence[Prompt]) -> str | None:
    """The metric of these prompts; None unless all have the same."""
    names = {METRICS.get(type(prompt.truth)) for prompt in prompts}
    return names.pop() if len(names) == 1 else None


def compare(
    metric: str, prompts: Sequence[Prompt], texts: Sequence[str], plain_texts: Sequence[str] | None
) -> dict[str, Any]:
    """Record fields: means over prompts, and the paired difference with its 95 % interval.

    texts, plain_texts: each prompt's output, and that of autoregressive decoding by the same engine, if there is one.
    Raises SandboxError if code would have to be run and cannot be.
    """
    scores = [score(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    plain = [score(prompt, text) for prompt, text in zip(prompts, plain_texts, strict=True)] if plain_texts else None
    difference = _difference(scores, plain) if plain else None
    return {
        **no_quality(metric, None),
        "quality": fmean(scores),
        "quality_baseline": fmean(plain) if plain else None,
        "quality_difference": difference.estimate if difference else None,
        "quality_difference_low": difference.low if difference else None,
        "quality_difference_high": difference.high if difference else None,
        "per_prompt_quality": scores,
        "baseline_per_prompt_quality": plain,
    }


def _difference(scores: Sequence[float], plain: Sequence[float]) -> Interval:
    """Of scores from 0 to 1, so from -1 to 1: with few prompts, Student's t reaches further."""
    found = mean_difference_interval(scores, plain)
    ends = (None if end is None else min(max(end, -1.0), 1.0) for end in (found.low, found.high))
    return Interval(found.estimate, *ends)


def no_quality(metric: str | None, reason: str | None) -> dict[str, Any]:
    """Record fields without a quality. reason: why it is missing."""
    names = ("", "_baseline", "_difference", "_difference_low", "_difference_high")
    return {
        "quality_metric": metric,
        "quality_reason": reason,
        **{f"quality{name}": None for name in names},
        "per_prompt_quality": None,
        "baseline_per_prompt_quality": None,
    }


def score(prompt: Prompt, text: str) -> float:
    """The score of an output, from 0 to 1. Raises SandboxError for code that cannot be run."""
    match prompt.truth:
        case Number(truth):
            return float((found := final_number(text)) is not None and found == final_number(truth))
        case Summary(truth):
            return rouge_1(text, truth)
        case Formula(truth):
            return float(formulas.is_equal(text, truth))
        case UnitTest():
            return float(_passes(programs.of_function(prompt.truth, text)))
        case Cases():
            return float(all(_passes(program, CASE_LIMITS) for program in programs.of_cases(prompt.truth, text)))
    raise ValueError(f"prompt={prompt.text[:40]!r} must have a truth to be scored by; choose another workload")


def rouge_1(text: str, reference: str) -> float:
    """ROUGE-1 F measure: shared words of two texts, each counted as often as in the text with fewer occurrences.

    Words are runs of letters a to z and digits in lower case, as in the package `rouge-score`, without stemming.
    Source: Lin 2004, ROUGE: a package for automatic evaluation of summaries.
    """
    words, reference_words = (Counter(re.findall(r"[a-z0-9]+", t.lower())) for t in (text, reference))
    num_shared = (words & reference_words).total()
    return 2 * num_shared / (words.total() + reference_words.total()) if num_shared else 0.0


@lru_cache(maxsize=10_000)  # most outputs are equal in plain and speculative decoding, and in all cells
def _passes(program: str, limits: sandbox.Limits = LIMITS) -> bool:
    return sandbox.run(program, limits).passed
