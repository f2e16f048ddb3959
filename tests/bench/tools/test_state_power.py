"""Bugs of caches, recurrent states and routers: judged here in few tokens, and in the committed table in many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.tools import detection_power, state_power

BASELINES = Path(__file__).parents[3] / "bench" / "baselines"
PAGE = (BASELINES / "certificates" / "README.md").read_text()


def committed() -> list[state_power.StateFinding]:
    records = json.loads((BASELINES / "audits" / "states.json").read_text())
    return [
        state_power.StateFinding(**record | {"audit": detection_power.Finding(**record["audit"])}) for record in records
    ]


@pytest.mark.parametrize(
    "name", ["W2 window by slot", "S4 refilled slot keeps its state", "R1 router fed with padding"]
)
def test_a_bug_of_the_state_changes_greedy_outputs_and_is_found_by_the_audit(name: str) -> None:
    (found,) = state_power.findings(2048, [name])
    assert found.num_different >= found.num_greedy / 2
    assert found.audit.found_by
    assert f"| {name} | {found.kind} | {found.num_different} of 16 | " in state_power.line(found)


@pytest.mark.parametrize(
    "case", [case for case in state_power.CASES if case.name == "none"], ids=lambda case: case.kind
)
def test_each_target_without_a_bug_passes_both_tests(case: state_power.Case) -> None:
    found = state_power.judge(case, 512)
    assert (found.num_different, found.audit.found_by, found.audit.errors) == (0, {}, ())


def test_the_page_has_the_table_of_states() -> None:
    found = committed()
    assert [(each.audit.mutant, each.kind) for each in found] == [(case.name, case.kind) for case in state_power.CASES]
    assert all(state_power.line(each) in PAGE for each in found)


def test_all_bugs_of_states_are_found_by_both_tests_and_no_sound_engine_by_either() -> None:
    for each in committed():
        if each.audit.mutant == "none":
            assert (each.num_different, each.audit.found_by) == (0, {})
            assert each.audit.num_draws >= 4000
        else:
            assert each.num_different > 0, each.audit.mutant
            assert each.audit.found_by, each.audit.mutant
