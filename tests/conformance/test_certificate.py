"""A certificate goes to JSON and back, and reads as a page."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from helpers.audited import PROMPTS, TARGET, ToyEngine

from bench.report import format
from specdec import SamplingParams
from specdec.conformance.audit import audit
from specdec.conformance.certificate import ArmFindings, Certificate, Findings, Subject, bounded
from specdec.conformance.reference import Reference
from specdec.conformance.statistics.betting import ConfidenceInterval
from specdec.conformance.verdicts import AuditLimits

SUBJECT = Subject("toy", "1.0", "markov", "draft_model", 3, "token", "pytest bench/ -m equivalence --engines toy")
# what the project's definition of a certificate asks for
FIELDS = [
    "verdict",
    "engine",
    "engine_version",
    "pair",
    "method",
    "gamma",
    "verification",
    "sampling",
    "p_values",
    "p_value",
    "tv_upper_bound",
    "tv_lower_bound",
    "min_detectable_tv",
    "num_draws",
    "seeds",
    "command",
    "versions",
    "control_p_values",
    "control_p_value",
    "reasons",
    "errors",
    "arms_p_value",
    "num_drafted",
    "num_accepted",
]


def findings(**sampling) -> Findings:
    params = SamplingParams(max_tokens=16, **sampling)
    limits = AuditLimits(max_tv=0.5)
    return audit(ToyEngine(params), Reference(TARGET, params), PROMPTS, num_draws=300, limits=limits)


def test_round_trip(tmp_path: Path) -> None:
    certificate = Certificate.of(SUBJECT, findings(logit_bias={}))
    certificate.save(tmp_path / "toy.json")
    assert Certificate.load(tmp_path / "toy.json").record() == certificate.record()
    assert Certificate.load(tmp_path / "toy.json").findings.speculative == certificate.findings.speculative


def test_the_record_has_the_fields_of_the_definition_and_is_plain_json() -> None:
    record = Certificate.of(SUBJECT, findings(logit_bias={0: -math.inf})).record()
    assert not set(FIELDS) - set(record)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["sampling"]["logit_bias"] == {"0": "-inf"}
    assert record["versions"].keys() >= {"python", "torch", "transformers", "numpy"}
    assert record["num_draws"] == 300
    assert record["seeds"][0] == 0


@pytest.mark.parametrize("version", [99, 0, None])
def test_another_schema_is_rejected(version: int | None) -> None:
    with pytest.raises(ValueError, match=f"schema_version={version} must be 1; repeat the audit"):
        Certificate.from_record({"schema_version": version})


def test_the_headline_of_an_inconclusive_audit_has_its_first_reason() -> None:
    doubtful = dataclasses.replace(findings(), verdict="inconclusive", reasons=("too few draws", "no draft", "none"))
    assert doubtful.headline == "inconclusive: too few draws"


@pytest.mark.parametrize(
    ("verdict", "low", "errors", "text"),
    [
        ("lossless", 0.0, [], "lossless (TV < 0.1)"),
        ("lossy", 0.03, [], "lossy (TV > 0.03)"),
        ("lossy", 0.03, ["too long"], "lossy (TV > 0.03)"),
        ("lossy", 0.0, [], "lossy (distribution differs, p = 2e-09)"),
        ("lossy", 0.0, ["too long"], "lossy (invalid output)"),
        ("inconclusive", 0.0, [], "inconclusive"),
    ],
)
def test_a_verdict_is_printed_with_its_bound(verdict: str, low: float, errors: list[str], text: str) -> None:
    """Also in reports, which do not import the audit."""
    assert bounded(verdict, 0.1, low, 2e-9, errors) == text
    record = {"verdict": verdict, "max_tv": 0.1, "tv_lower_bound": low, "p_value": 2e-9, "errors": errors}
    assert format.verdict(record) == text


def test_a_distance_that_is_not_bounded_is_not_printed() -> None:
    """A bug found before its size is known: no page says that a distance is at least 0."""
    lossless = findings()
    speculative = dataclasses.replace(lossless.speculative, p_value=2e-9)
    found = dataclasses.replace(lossless, verdict="lossy", tv_lower_bound=0.0, speculative=speculative)
    page = Certificate.of(Subject(), found).markdown()
    assert page.startswith("# lossy (distribution differs, p = 2e-09): an engine")
    assert "at least 0 %" not in page


@pytest.mark.parametrize("subject", [Subject(), SUBJECT])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0}, {"logit_bias": {}, "stop": ()}], ids=str)
def test_nothing_unknown_or_empty_is_printed(subject: Subject, sampling: dict) -> None:
    page = Certificate.of(subject, findings(**sampling)).markdown()
    assert not re.search(r"\b(None|nan|inf)\b|\(\)|\[\]|\{\}", page), page


def test_the_page_states_the_findings() -> None:
    page = Certificate.of(SUBJECT, findings()).markdown()
    assert page.startswith(
        "# lossless (TV < 0.5): engine toy, engine_version 1.0, pair markov, method draft_model, gamma 3"
    )
    assert "| pit_rank |" in page
    assert "300 tokens were tested" in page
    assert re.search(r"\n\d+ tokens were drafted, \d+ of them accepted\.\n", page)
    assert "    pytest bench/ -m equivalence --engines toy" in page
    assert "None" not in page


def test_the_page_of_greedy_decoding() -> None:
    page = Certificate.of(Subject(), findings(temperature=0)).markdown()
    assert page.startswith("# lossless (TV < 0.5): an engine")  # three prompts are 48 tokens, enough for max_tv=0.5
    assert "differ from the target's argmax" in page


def arm(**changes) -> ArmFindings:
    values = {
        "p_values": {"pit_rank": 0.125, "draft": 0.5},
        "p_value": 0.25,
        "found_after": {"pit_rank": 40, "draft": None},
        "shifts": {"draft": ConfidenceInterval(0.01, -0.02, 0.04)},
        "surprise_z": None,
        "num_draws": 300,
        "num_outputs": 20,
        "seeds": (0, 19),
        "num_outside": {"by rounding": 2, "by more": 1},
        "largest_gap": 0.0625,
        "errors": (),
    }
    return ArmFindings(**values | changes)


def test_every_number_of_the_page() -> None:
    found = Findings(
        verdict="lossy",
        reasons=("a reason", "another"),
        speculative=arm(errors=("a token twice",)),
        control=arm(p_values={"pit_rank": 0.75, "draft": 1.0}, p_value=1.0, shifts={}, surprise_z=-1.5, seeds=(20, 39)),
        arms_p_value=0.375,
        direction="draft",
        tv_lower_bound=0.03125,
        tv_upper_bound=0.125,
        min_detectable_tv=0.0625,
        max_tv=0.05,
        num_draws_needed=480,
        alpha=0.001,
        beta=0.01,
        logit_noise=0.25,
        sampling={"temperature": 1.0, "top_k": None, "seed": 0},
        num_drafted=90,
        num_accepted=60,
    )
    assert str(found).splitlines() == [
        "lossy (TV > 0.031)",
        "",
        "- a reason",
        "- another",
        "",
        "Toward or away from the draft, the distance from the target is at most 12.5 % (and the total variation "
        "distance at least 3.12 %), except with probability 0.001.",
        "300 tokens were tested; a distance of 6.25 % in that direction would have been detected except with "
        "probability 0.01. Detecting the requested 5 % takes 480 tokens.",
        "",
        "90 tokens were drafted, 60 of them accepted.",
        "",
        "| instrument | p with speculation | p without | found after | deviation with speculation | without |",
        "|---|---|---|---|---|---|",
        "| pit_rank | 0.12 | 0.75 | 40 tokens | - | - |",
        "| draft | 0.5 | 1 | - | +0.0100 (-0.0200 to +0.0400) | - |",
        "| all, corrected | 0.25 | 1 | | | |",
        "",
        "Both arms having the same distribution: p = 0.38 (needs no reference).",
        "",
        "With speculation: 20 outputs, 300 tokens tested, seeds 0 to 19; 2 tokens outside the reference's support by "
        "rounding (up to 0.0625 logits), 1 by more (over 0.25).",
        "",
        "- a token twice",
        "",
        "Without speculation (the control arm): 20 outputs, 300 tokens tested, seeds 20 to 39; 2 tokens outside the "
        "reference's support by rounding (up to 0.0625 logits), 1 by more (over 0.25). Surprise: -1.50 standard "
        "deviations.",
        "",
        "",
        "Sampling: temperature 1.0, seed 0.",
    ]
