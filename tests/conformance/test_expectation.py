"""The duration of an audit is announced before it starts, is measured, and changes none of its findings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
from helpers.audited import PROMPTS, ToyEngine
from helpers.terminal import Terminal

from specdec import SamplingParams
from specdec.conformance import audit as audits
from specdec.conformance.audit import audit, expectation
from specdec.conformance.reference import Reference
from specdec.conformance.verdicts import AuditLimits


class Clocked(ToyEngine):
    """Tokens take a second each with speculation and two without, on a clock of its own. calls: their seeds."""

    def __init__(self, params: SamplingParams) -> None:
        super().__init__(params)
        self.now_s, self.calls = 0.0, list[Sequence[int]]()

    def speculative(self, prompts, seeds, max_tokens):
        return self.timed(super().speculative(prompts, seeds, max_tokens), seeds, 1)

    def plain(self, prompts, seeds, max_tokens):
        return self.timed(super().plain(prompts, seeds, max_tokens), seeds, 2)

    def timed(self, outputs, seeds, seconds):
        self.now_s += seconds * sum(map(len, outputs))
        self.calls.append(seeds)
        return outputs


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    made = Clocked(SamplingParams(max_tokens=40))
    monkeypatch.setattr(audits.time, "perf_counter", lambda: made.now_s)
    return made


@pytest.mark.parametrize(
    ("num_draws", "text"),
    [
        (20, "audit: 20 tokens of each arm, about 60 seconds"),
        (400, "audit: 400 tokens of each arm, about 20 minutes"),
        (20_000, "audit: 20,000 tokens of each arm, about 16.7 hours"),
    ],
)
def test_it_is_measured(engine: Clocked, num_draws: int, text: str) -> None:
    reference = Reference(engine.target, engine.params)
    assert expectation(engine, reference, PROMPTS, num_draws=num_draws, batch_size=2) == text
    assert [len(seeds) for seeds in engine.calls] == [2] * 4  # one round that warms up, one that counts
    assert engine.now_s == 2 * 2 * audits.CALIBRATION_TOKENS * 3  # short outputs, though requests are for 40 tokens


def test_greedy_audits_use_each_prompt_once(engine: Clocked) -> None:
    greedy = Reference(engine.target, SamplingParams(temperature=0, max_tokens=10))
    assert expectation(engine, greedy, PROMPTS) == "audit: 30 tokens of each arm, about 90 seconds"


def test_the_audit_says_it_first_and_finds_the_same(engine: Clocked, monkeypatch: pytest.MonkeyPatch) -> None:
    def findings(engine: ToyEngine):
        return audit(engine, reference, PROMPTS, num_draws=240, batch_size=3, limits=AuditLimits(max_tv=0.9))

    reference = Reference(engine.target, engine.params)
    silent = findings(ToyEngine(engine.params))
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal.stream)
        found = findings(engine)
    shown = terminal.shown()
    terminal.close()
    said, bar = shown.index("audit: 240 tokens of each arm, about 12 minutes"), shown.index("audit, of each arm:")
    assert said < bar
    assert found == silent  # numbers of drafts, too: what was measured before is no evidence
    assert found.num_drafted
    calibration, evidence = engine.calls[:4], engine.calls[4:]
    assert min(min(seeds) for seeds in calibration) > max(max(seeds) for seeds in evidence)


def test_counts_of_an_earlier_audit_do_not_confirm_speculation() -> None:
    """An engine that has speculated once and no longer does is not called lossless for what it did then."""

    class Tired(ToyEngine):
        def speculative(self, prompts, seeds, max_tokens):
            if self.num_drafted:
                return self.plain(prompts, seeds, max_tokens)
            return super().speculative(prompts, seeds, max_tokens)

    engine = Tired(SamplingParams(max_tokens=32))
    reference = Reference(engine.target, engine.params, 16)
    options = {"num_draws": 480, "batch_size": 16, "limits": AuditLimits(max_tv=0.3)}
    audit(engine, reference, PROMPTS, **options)
    found = audit(engine, reference, PROMPTS, seed=1, **options)
    assert (found.verdict, found.num_drafted) == ("inconclusive", 0)
    assert "speculation not confirmed" in found.headline
