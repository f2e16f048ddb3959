"""Scores of outputs, against tables made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.bench_runs import decoded, printed, row_of
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedTokenizerFast

from bench.campaign.config import BenchConfig
from bench.campaign.golden import AcceptanceLength
from bench.catalogue.pairs import Pair
from bench.engines.base import PromptResult, Run
from bench.measure.paired import BASELINE, CANDIDATE
from bench.measure.quality import sandbox, scores
from bench.measure.quality.sandbox import Outcome
from bench.workloads import registry
from bench.workloads.base import Number, Prompt, Summary

DATA = Path(__file__).parents[1] / "data"
CODE = "You can halve it so:\n```python\ndef half(x):\n    return {}\n```\nThis rounds down. def half is short."


def test_exact_match_compares_numbers_not_texts() -> None:
    prompt = Prompt("?", truth=Number("1,750"))
    assert [scores.score(prompt, text) for text in ("It is 1750.00.", "#### 175", "none")] == [1, 0, 0]


def test_rouge_1_by_hand() -> None:
    """4 words shared ("the" once, as the reference has it once), of 6 and of 5: precision 4/6, recall 4/5, F 8/11."""
    assert scores.rouge_1("The cat sat on the mat.", "the CAT sat; on rugs") == pytest.approx(8 / 11)
    assert scores.rouge_1("a b", "a b") == 1
    assert scores.rouge_1("a b", "c") == scores.rouge_1("", "c") == scores.rouge_1("", "") == 0


@pytest.mark.skipif(sandbox.why_not() is not None, reason=f"no sandbox here: {sandbox.why_not()}")
def test_pass_at_1_runs_the_code() -> None:
    half, fourfold = registry.read("humaneval", DATA)
    right = ["    return math.floor(x / 2)\n", CODE.format("math.floor(x / 2)"), CODE.format("x // 2")]
    wrong = ["    return int(x / 2)\n", CODE.format("x / 2"), "", "```python\nimport sys\nsys.exit(0)\n```"]
    assert [scores.score(half, text) for text in right] == [1, 1, 1]
    assert [scores.score(half, text) for text in wrong] == [0, 0, 0, 0]
    assert scores.score(fourfold, "```python\ndef fourfold(x):\n    return twice(twice(x))\n```") == 1


def test_the_fields_of_known_outputs() -> None:
    prompts = [Prompt("a", truth=Number("1")), Prompt("b", truth=Number("2"))]
    assert scores.metric_of(prompts) == "exact_match"
    assert scores.compare("exact_match", prompts, ["1", "2"], ["1", "3"]) == {
        "quality_metric": "exact_match",
        "quality_reason": None,
        "quality": 1.0,
        "quality_baseline": 0.5,
        "quality_difference": 0.5,
        "quality_difference_low": -1.0,  # two prompts: t would reach to 0.5 - 12.7 / 2
        "quality_difference_high": 1.0,
        "per_prompt_quality": [1.0, 1.0],
        "baseline_per_prompt_quality": [1.0, 0.0],
    }
    alone = scores.compare("exact_match", prompts, ["1", "3"], None)
    assert (alone["quality"], alone["quality_baseline"], alone["quality_difference"]) == (0.5, None, None)
    assert scores.metric_of([Prompt("a"), prompts[0]]) is None
    assert scores.metric_of([Prompt("a", truth=Summary("x"))]) == "rouge_1"


def measured(*texts: str, plain: tuple[str, ...]) -> dict[str, list[Run]]:
    def runs(outputs: tuple[str, ...]) -> list[Run]:
        return [Run((PromptResult(tuple(text.encode()), 0.1, 0.2, None, "stop"),)) for text in outputs]

    return {CANDIDATE: runs(texts), BASELINE: runs(plain)}


@pytest.mark.parametrize(
    ("changes", "pair", "reason"),
    [
        ({}, Pair("p", "t"), None),
        ({}, Pair("p", "t", load_format="dummy"), "pair=p has random weights, whose output means nothing"),
        ({"synthetic_acceptance_rates": (0.5,), "engines": ("specdec",)}, Pair("p", "t"), "acceptance was prescribed"),
        ({"synthetic_acceptance_length": AcceptanceLength(2.5)}, Pair("p", "t"), "acceptance was prescribed"),
    ],
)
def test_prescribed_output_has_no_quality(
    changes: dict[str, Any], pair: Pair, reason: str | None, make_config: Callable[..., BenchConfig]
) -> None:
    config = make_config(workloads=("gsm8k",), data_dir=DATA, num_prompts=2, **changes)
    prompts = [Prompt("a", truth=Number("1")), Prompt("b", truth=Number("2"))]
    fields = scores.of_run(config, pair, prompts, measured("#### 1", "#### 2", plain=("#### 1", "#### 3")), None)
    assert fields["quality_metric"] == "exact_match"
    if reason is None:
        assert (fields["quality"], fields["quality_baseline"], fields["quality_reason"]) == (1.0, 0.5, None)
    else:
        assert fields["quality"] is fields["quality_difference"] is None
        assert reason in fields["quality_reason"]


def test_code_is_run_only_if_that_is_allowed(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(sandbox, "run", lambda program, limits: ran.append(program) or Outcome(True))
    monkeypatch.setattr(sandbox, "why_not", lambda: None)
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2)
    prompts = registry.read("humaneval", DATA)
    outputs = measured("    return 1", "    return 2", plain=("    return 1", "    return 3"))
    refused = scores.of_run(config, Pair("p", "t"), prompts, outputs, None)
    assert refused["quality"] is None
    assert refused["quality_reason"] == "code that a model wrote is run only with --allow-code-execution"
    assert not ran
    allowed = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, allow_code_execution=True)
    scores._passes.cache_clear()
    assert scores.of_run(allowed, Pair("p", "t"), prompts, outputs, None)["quality"] == 1.0
    assert len(ran) == 3  # one output is the same in both arms
    scores._passes.cache_clear()


def test_code_that_cannot_be_run_loses_no_measurement(
    make_config: Callable[..., BenchConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: str, limits: object) -> Outcome:
        raise sandbox.SandboxError("no namespaces left")

    monkeypatch.setattr(sandbox, "why_not", lambda: None)
    config = make_config(workloads=("humaneval",), data_dir=DATA, num_prompts=2, allow_code_execution=True)
    monkeypatch.setattr(sandbox, "run", fail)
    scores._passes.cache_clear()
    prompts, outputs = registry.read("humaneval", DATA), measured("a", "b", plain=("a", "b"))
    fields = scores.of_run(config, Pair("p", "t"), prompts, outputs, None)
    assert fields["quality_reason"] == "code could not be run: no namespaces left"
    assert fields["quality"] is None


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a text's first space is not its own, and is left out where a text is decoded."""
    marks = ["▁", "▁▁", "▁▁▁▁"]
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n", *marks]
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    whole = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    whole.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token="</s>", unk_token="<unk>")


def test_an_output_keeps_the_spaces_that_it_begins_with() -> None:
    tokenizer, head, body = sentencepiece(), "def add(a, b):\n", "    c = a + b\n    return c\n"
    before, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (head, head + body))
    assert whole[: len(before)] == before
    emitted = (*whole[len(before) :], tokenizer.eos_token_id)
    assert tokenizer.decode(emitted, skip_special_tokens=True) != body
    assert scores.texts([Run((PromptResult(emitted, 0.0, 0.0, None, "stop"),))], tokenizer) == [body]


def test_the_terminal_shows_quality_where_it_was_measured() -> None:
    prompts = [Prompt("a", truth=Number("1")), Prompt("b", truth=Number("2"))]
    record = decoded("ngram", 4) | scores.compare("exact_match", prompts, ["1", "2"], ["1", "3"])
    plain = decoded("autoregressive") | scores.compare("exact_match", prompts, ["1", "2"], None)
    lines = printed([plain, record])
    quality = lines[lines.index("Quality") :]
    assert row_of(quality, "specdec", "ngram", "4")[3:] == [
        *("exact_match", "1.000", "0.500", "+0.500", "[-1.000,", "+1.000]"),
    ]
    assert row_of(quality, "specdec", "autoregressive", "0")[3:] == ["exact_match", "1.000", "-", "-"]
    assert "exact_match" not in " ".join(printed([record | scores.no_quality("exact_match", "x")]))
