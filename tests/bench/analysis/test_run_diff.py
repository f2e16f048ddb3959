"""Differences between two runs, from times computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.bench_runs import MACHINE, audited, decoded, loaded, row_of, sized, write

from bench.analysis import run_diff
from bench.analysis.run_diff import Difference
from bench.records import campaigns, results
from bench.records.intervals import Interval, geometric_mean_interval
from bench.report import changes
from bench.report.terminal import chapter as terminal


def pair_of_runs(folder: Path, before: list[Any], after: list[Any], **changes: Any) -> tuple[Any, Any]:
    paths = [write(folder / "before.json", before), write(folder / "after.json", after, **changes)]
    first, second = campaigns.read_all(paths)
    return first, second


SAME = Interval(1.0, 1.0, 1.0)
PLAIN = {"baseline_per_prompt_latency_s": [2.0, 4.0]}  # as of `decoded` without other times


def only(folder: Path, before: Any, after: Any, **changes: Any) -> Difference:
    (found,) = run_diff.differences(*pair_of_runs(folder, [before], [after], **changes))
    return found


@pytest.mark.parametrize(
    ("latency_s", "verdict", "times"),
    [
        ((0.5, 1.0), "faster", Interval(2.0, 2.0, 2.0)),
        ((4.0, 8.0), "slower", Interval(0.25, 0.25, 0.25)),
        ((0.5, 4.0), "no difference seen", Interval(1.0, 2**-12.7062, 2**12.7062)),
        ((1.0, 2.0), "no difference seen", Interval(1.0, 1.0, 1.0)),
    ],
)
def test_a_verdict_is_by_the_interval(
    latency_s: tuple[float, ...], verdict: str, times: Interval, tmp_path: Path
) -> None:
    """Two prompts, so one degree of freedom: ratios of 2 and 1/2 have a standard error of log 2."""
    found = only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, latency_s, **PLAIN))
    assert found.verdict == verdict
    assert found.times is not None
    assert [found.times.estimate, found.times.low, found.times.high] == pytest.approx(
        [times.estimate, times.low, times.high], rel=1e-4
    )
    assert found.reasons == ()


def test_times_are_per_token(tmp_path: Path) -> None:
    """Twice as long for twice as many tokens is as fast."""
    after = decoded("ngram", 2, (2.0, 4.0), per_prompt_tokens=[20, 20], baseline_per_prompt_tokens=[20, 20])
    found = only(tmp_path, decoded("ngram", 2), after)
    assert (found.verdict, found.times) == ("no difference seen", Interval(1.0, 1.0, 1.0))


def test_rounds_of_a_batch_are_one_observation(tmp_path: Path) -> None:
    """(1 + 3) / 20 seconds per token against (1 + 1) / 20."""
    cells = [decoded("ngram", 2, latency_s, batch_size=2, **PLAIN) for latency_s in ((1.0, 3.0), (1.0, 1.0))]
    found = only(tmp_path, *cells)
    assert (found.times, found.verdict) == (Interval(2.0, None, None), "no difference seen")
    assert found.reasons == ("one round has no interval",)


def test_speed_changes_of_the_machine_are_not_attributed_to_a_cell(tmp_path: Path) -> None:
    """Twice as fast, but so is plain decoding beside it: the cell itself is unchanged."""
    found = only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, (0.5, 1.0)))
    assert (found.verdict, found.times, found.plain) == ("no difference seen", SAME, Interval(2.0, 2.0, 2.0))
    assert only(tmp_path, decoded("autoregressive"), decoded("autoregressive")).plain is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (decoded("autoregressive"), decoded("autoregressive", 0, (0.5, 1.0))),
        (decoded("autoregressive"), decoded("autoregressive", 0, (4.0, 8.0))),
    ],
)
def test_times_with_nothing_beside_them_tell_of_the_machine_only(before: Any, after: Any, tmp_path: Path) -> None:
    assert only(tmp_path, before, after).verdict == "the machine changed"


def test_a_plain_arm_of_other_prompts_is_nothing_beside_them(tmp_path: Path) -> None:
    of_three = {"baseline_per_prompt_latency_s": [2.0] * 3, "baseline_per_prompt_tokens": [10] * 3}
    found = only(tmp_path, decoded("ngram", 2, **of_three), decoded("ngram", 2, (0.5, 1.0), **of_three))
    assert (found.verdict, found.plain) == ("the machine changed", None)


def test_costs_have_nothing_beside_them(tmp_path: Path) -> None:
    before = write(tmp_path / "before.json", [sized("width", 1, 0.5)])
    after = tmp_path / "after.json"
    after.write_text(before.read_text().replace("[0.5, 0.25]", "[8.0, 4.0]"))
    (found,) = run_diff.differences(*campaigns.read_all([before, after]))
    assert found.verdict == "the machine changed"


def test_one_commit_measured_twice_under_different_load_is_no_difference(tmp_path: Path) -> None:
    """Load slows both arms of a cell equally, prompt by prompt, with noise of 5 %."""
    random = np.random.default_rng(3)
    cells = []
    for load in (1.0, 3.0):
        slower = load * np.exp(random.normal(0, 0.3, 30))
        times = (slower * np.exp(random.normal(0, 0.05, 30))).tolist()
        cells.append(decoded("ngram", 2, times, baseline_per_prompt_latency_s=(2 * slower).tolist()))
    found = only(tmp_path, *cells)
    assert found.verdict == "no difference seen"
    assert found.plain.high < 0.5
    faster = cells[1] | {"per_prompt_latency_s": [0.9 * each for each in cells[1]["per_prompt_latency_s"]]}
    assert only(tmp_path, cells[0], faster).verdict == "faster"


@pytest.mark.parametrize(("digest", "equal"), [("a" * 64, True), ("b" * 64, False), (None, None)])
def test_outputs_are_compared_by_their_digests(digest: str | None, equal: bool | None, tmp_path: Path) -> None:
    assert only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, output_sha256=digest)).outputs_equal is equal


@pytest.mark.parametrize(
    ("cell", "run", "reason"),
    [
        ({"max_tokens": 20}, {}, "options: max_tokens was 10 and is 20"),
        ({"temperature": 1.0}, {}, "options: temperature was 0.0 and is 1.0"),
        ({"draft": "another"}, {}, "options: draft was None and is another"),
        ({"seed": 1}, {}, "prompts: seed was 0 and is 1"),
        ({"prompt_lengths": "1:9"}, {}, "prompts: prompt_lengths was None and is 1:9"),
        (
            {"per_prompt_latency_s": None},
            {},
            "prompts: times of single prompts were not recorded, or for different numbers of prompts",
        ),
        (
            {"per_prompt_latency_s": [1.0] * 3, "per_prompt_tokens": [10] * 3},
            {},
            "prompts: times of single prompts were not recorded, or for different numbers of prompts",
        ),
        ({}, {"cpu_model": "another"}, "machine: cpu_model was a processor and is another"),
        ({}, {"gpus": ["a GPU"]}, "machine: gpus was [] and is ['a GPU']"),
        ({}, {"python_version": "3.12"}, "versions: python was 3.11.7 and is 3.12"),
        ({}, {"versions": MACHINE["versions"] | {"torch": "2"}}, "versions: torch was 2.13.0 and is 2"),
    ],
)
def test_incomparable_runs_give_a_reason(cell: Any, run: Any, reason: str, tmp_path: Path) -> None:
    found = only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, **cell), machine_info=MACHINE | run)
    assert (found.verdict, found.times, found.reasons) == ("not comparable", None, (reason,))
    assert found.outputs_equal is True


def test_other_numbers_of_prompts_are_named(tmp_path: Path) -> None:
    found = only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, (1.0, 1.0, 1.0)))
    assert found.reasons[0] == "prompts: num_prompts was 2 and is 3"


def test_versions_that_are_compared_may_differ(tmp_path: Path) -> None:
    """specdec's own is what two runs are for; vLLM's matters to vLLM only."""
    versions = MACHINE["versions"] | {"specdec": "0.2.0", "vllm": "1"}
    changed = {"machine_info": MACHINE | {"versions": versions}}
    found = only(tmp_path, decoded("ngram", 2), decoded("ngram", 2, engine_version="0.2.0"), **changed)
    assert found.verdict == "no difference seen"
    arms = [decoded("ngram", 2, engine="vllm", engine_version=version) for version in ("0", "1")]
    assert only(tmp_path, *arms, **changed).reasons == ("versions: engine was 0 and is 1",)
    others = [decoded("ngram", 2, engine="engines", engine_version=version) for version in ("0", "1")]
    assert only(tmp_path, *others).reasons == ("versions: engine was 0 and is 1",)


def test_other_texts_of_the_same_workload_are_detected(tmp_path: Path) -> None:
    configuration_of_both = {"workloads": ["smoke"], "num_prompts": 2, "seed": 0, "prompt_lengths": None}
    before, after, same = [
        results.read(
            write(
                tmp_path / f"{number}.json",
                [decoded("ngram", 2)],
                configuration=configuration_of_both | {"prompts_sha256": digest * 64},
            )
        )
        for number, digest in enumerate("aba")
    ]
    for runs in ((before, after), (after, before)):
        (found,) = run_diff.differences(*runs)
        assert found.reasons == ("prompts: the workload's texts differ",)
    (found,) = run_diff.differences(before, same)
    assert found.verdict == "no difference seen"


def test_digests_of_other_workloads_tell_nothing(tmp_path: Path) -> None:
    before, after = [
        results.read(
            write(
                tmp_path / f"{name}.json",
                [decoded("ngram", 2)],
                configuration={"workloads": ["smoke", name], "num_prompts": 2, "seed": 0, "prompts_sha256": name * 64},
            )
        )
        for name in "ab"
    ]
    (found,) = run_diff.differences(before, after)
    assert (found.verdict, found.reasons) == ("no difference seen", ())


def test_cells_of_only_one_run_are_listed(tmp_path: Path) -> None:
    before, after = [decoded("ngram", 1), decoded("ngram", 2)], [decoded("ngram", 2), decoded("ngram", 3)]
    found = run_diff.differences(*pair_of_runs(tmp_path, before, after))
    assert [(each.record["gamma"], each.verdict) for each in found] == [
        (2, "no difference seen"),
        (3, "only in after"),
        (1, "only in before"),
    ]


def test_load_is_one_observation(tmp_path: Path) -> None:
    found = only(tmp_path, loaded(2.0, "ngram", 2), loaded(2.0, "ngram", 2))
    assert (found.verdict, len(found.reasons)) == ("not comparable", 1)
    assert found.reasons[0].startswith("load: requests wait for each other")


def test_costs_are_compared_by_their_rounds(tmp_path: Path) -> None:
    """Rounds of 0.5 and 0.25 s against themselves: each mean logarithm has a standard error of log(2) / 2, and the two
    together have two degrees of freedom.
    """
    found = only(tmp_path, sized("width", 1, 0.5), sized("width", 1, 0.5))
    assert found.verdict == "no difference seen"
    assert found.times is not None
    expected = (1.0, 2 ** -(4.302653 / 2**0.5), 2 ** (4.302653 / 2**0.5))
    assert (found.times.estimate, found.times.low, found.times.high) == pytest.approx(expected)


@pytest.mark.parametrize("silent", [0, 1])
def test_costs_without_rounds_are_not_compared(silent: int, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.json", [sized("width", 1, 0.5)]) for name in ("before", "after")]
    paths[silent].write_text(paths[silent].read_text().replace("[0.5, 0.25]", "[]"))
    (found,) = run_diff.differences(*campaigns.read_all(paths))
    assert found.reasons == ("rounds: their times were not recorded",)


def test_unchanged_cells_rarely_get_a_verdict_of_change() -> None:
    """300 comparisons of 30 prompts with noise of 10 % and no difference: 5 % look like one; more than 36 of 300 then
    have a probability of 1e-6. The negative controls: ends
    half as far away give 90 and more, and a real difference of 10 % is nearly always found.
    """
    random = np.random.default_rng(1)
    noise = random.normal(0, 0.1, (300, 30))
    intervals = [geometric_mean_interval(np.exp(row).tolist()) for row in noise]
    assert sum(run_diff.verdict(each) != "no difference seen" for each in intervals) <= 36
    halved = [
        Interval(each.estimate, *np.sqrt([each.low * each.estimate, each.high * each.estimate])) for each in intervals
    ]
    assert sum(run_diff.verdict(each) != "no difference seen" for each in halved) > 36
    real = [run_diff.verdict(geometric_mean_interval((1.1 * np.exp(row)).tolist())) for row in noise[:50]]
    assert real.count("faster") >= 45


def test_the_terminal_lists_changes(tmp_path: Path) -> None:
    before = [decoded("ngram", 2), decoded("ngram", 3), decoded("eagle", 2), audited("lossless")]
    after = [decoded("ngram", 2, (0.5, 1.0), **PLAIN), decoded("ngram", 3, top_k=5), audited("lossy")]
    lines = list(terminal.render(changes.chapter(*pair_of_runs(tmp_path, before, after), "changes")))
    assert lines[0] == "What changed: after against before"
    assert "     1  of 3 cells: faster" in lines
    faster = row_of(lines, "ngram", "2", "faster")
    assert faster[3:] == ["2.000", "[2.000,", "2.000]", "1.000", "[1.000,", "1.000]", "equal"]
    assert "    options: top_k was 0 and is 5" in lines
    assert all(len(line) <= 80 for line in lines)


def test_the_chapter_counts_and_tells_audits(tmp_path: Path) -> None:
    before = [decoded("ngram", 2), decoded("ngram", 3), decoded("eagle", 2), audited("lossless")]
    after = [decoded("ngram", 2, (0.5, 1.0), **PLAIN), decoded("ngram", 3, top_k=5), audited("lossy")]
    chapter = changes.chapter(*pair_of_runs(tmp_path, before, after), "changes")
    assert [(card.number, card.sentence) for card in chapter.cards] == [
        ("1", "of 3 cells: faster"),
        ("1", "of 3 cells: not comparable"),
        ("1", "of 3 cells: only in one of the runs"),
        ("2 of 2", "cells whose outputs are equal, token for token"),
    ]
    cells, audits = chapter.sections[0].parts[-2:]
    assert cells.rows[0] == (
        *("specdec", "ngram", "2", "faster", "2.000 [2.000, 2.000]", "1.000 [1.000, 1.000]", "equal", "-"),
    )
    assert audits.rows == (("equivalence-specdec-tiny-ngram-2", "lossless (TV < 0.1)", "lossy (TV > 0.02)"),)
