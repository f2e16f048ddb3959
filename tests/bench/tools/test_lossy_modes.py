"""The cost of lossy rules: exact distances of real outputs on a toy, and none for lossless verification."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.audited import DRAFT, PROMPTS, TARGET
from helpers.tokens import letters

from bench.report.charts import files
from bench.tools import lossy_modes
from bench.workloads.base import Number, Prompt, Summary, UnitTest
from specdec import SamplingParams
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.lossy_sizes import first_token
from specdec.conformance.statistics.sizes import total_variation
from specdec.lossy import lossy_rule

ROOT = Path(__file__).parents[3]
BASELINE = ROOT / "bench" / "baselines" / "audits" / "lossy-modes.json"
TOKENIZER = letters(61)
NAMES = (
    "lossy:typical(epsilon=0.3, delta=0.3)",
    "lossy:threshold(single=0.3, acc=1)",
    "lossy:fly(window=1, entropy=0.3)",
)


def test_costs_on_a_toy() -> None:
    references = [Reference(model, SamplingParams(max_tokens=40)) for model in (TARGET, DRAFT)]
    lossless, typical, threshold, fly = lossy_modes.measure(TARGET, DRAFT, references, PROMPTS * 2, NAMES)
    assert (lossless.tv.estimate, lossless.kl.estimate, lossless.logprob_change.estimate) == (0, 0, 0)
    assert lossless.speedup.estimate == 1
    for each in (typical, threshold):
        assert 0.02 < each.tv.low <= each.tv.estimate <= each.tv.high < 1
        assert each.tv.estimate**2 * 2 <= each.kl.estimate  # Pinsker
        assert each.num_tokens == 6 * 40
    assert fly.tv is fly.kl is None
    assert fly.acceptance_rate > lossless.acceptance_rate
    assert fly.mean_acceptance_length > lossless.mean_acceptance_length > 1
    assert fly.quality is fly.quality_change is None
    assert "| no formula | no formula |" in lossy_modes.line(fly)


def test_distances_by_hand() -> None:
    """Each accepted or recovered token by the formula with its own two rows, and 0 for the prefill's and the bonus."""
    references = [Reference(model, SamplingParams(max_tokens=12)) for model in (TARGET, DRAFT)]
    engine = lossy_modes.Engine(TARGET, method="draft_model", draft=DRAFT, verification=NAMES[0])
    (completion,) = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=12, ignore_eos=True))
    text, expected = [*PROMPTS[0]], 0.0
    for token, source in zip(completion.token_ids, completion.sources, strict=True):
        rows = [model.table[text[-2], text[-1]].double()[None] for model in (TARGET, DRAFT)]
        if source in ("accepted", "recovered"):
            expected += float(total_variation(first_token(lossy_rule(NAMES[0]), *rows), rows[0]))
        text.append(token)
    found = lossy_modes.distances(NAMES[0], references, [completion])
    assert found is not None
    assert found[0] == pytest.approx([expected / 12], abs=1e-6)
    assert {"accepted", "bonus"} & set(completion.sources)
    assert torch.isfinite(torch.tensor(found[1])).all()


def completions(*outputs: list[int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(token_ids=output) for output in outputs]


def test_outputs_are_scored_by_the_truth_of_their_prompts() -> None:
    tokens = TOKENIZER("a b", add_special_tokens=False).input_ids
    asked = [Prompt("?", truth=Summary("a b")), Prompt("?", truth=Summary("c"))]
    assert lossy_modes.scores(asked, completions(tokens, tokens), TOKENIZER) == [1.0, 0.0]
    assert lossy_modes.scores([Prompt("?", truth=Number("7"))], completions(tokens), TOKENIZER) == [0.0]


@pytest.mark.parametrize("truth", [None, UnitTest("def f():", "def check(f): pass", "f")])
def test_prompts_without_a_score_and_those_that_run_code_have_none(truth: UnitTest | None) -> None:
    assert lossy_modes.scores([Prompt("?", truth=truth)], completions([3]), TOKENIZER) is None


def test_measurements_come_back_from_their_file(tmp_path: Path) -> None:
    references = [Reference(model, SamplingParams(max_tokens=8)) for model in (TARGET, DRAFT)]
    costs = lossy_modes.measure(TARGET, DRAFT, references, PROMPTS[:2], NAMES)
    (tmp_path / "costs.json").write_text(json.dumps({"costs": [asdict(each) for each in costs]}))
    assert lossy_modes.read(tmp_path / "costs.json") == costs


def test_the_curve_has_a_series_for_each_rule_with_a_formula() -> None:
    chart = lossy_modes.curve(lossy_modes.read(BASELINE), "about")
    assert [series.label for series in chart.series] == ["lossless", "typical", "threshold", "top_k"]
    for series in chart.series:
        assert list(series.x) == sorted(series.x)
        assert len(series.x) == len(series.y) == len(series.names or ())
    assert chart.series[0].x == (0.0,)


def test_the_page_and_the_chart_show_the_committed_curve() -> None:
    """Which names each setting and the load under which times were taken."""
    costs, record = lossy_modes.read(BASELINE), json.loads(BASELINE.read_text())
    assert [each.verification for each in costs] == [lossy_modes.LOSSLESS, *lossy_modes.SETTINGS]
    page = (ROOT / "docs" / "lossy-verification.md").read_text()
    assert lossy_modes.table(costs) in page
    assert f"load of {record['load_averages'][0]:.1f}" in " ".join(page.split())
    assert record["command"] in re.sub(r" *\\\n *", " ", page)
    svg = (ROOT / "bench" / "baselines" / "plots" / "lossy-modes-tv-speedup.svg").read_text()
    drawn = files.document(lossy_modes.curve(costs, ""), "")
    assert re.findall(r"<title>.*?</title>", drawn) == re.findall(r"<title>.*?</title>", svg)
