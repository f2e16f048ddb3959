"""Records and the table, from runs with known numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from helpers.bench_runs import printed, row_of

from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import catalogue
from bench.engines.base import PromptResult, Run, Urls
from bench.measure import records, telemetry
from bench.measure.paired import BASELINE, CANDIDATE, REFERENCE, Measurement, check_counts, measure
from bench.records.schema import Cell
from specdec import AcceptanceCounts, PhaseTimes

T_1 = 12.706204736  # 97.5 % quantile of Student's t with one degree of freedom
TINY = catalogue()["tiny-random"]


def counted(*steps: tuple[int, int, int]) -> AcceptanceCounts:
    counts = AcceptanceCounts()
    for step in steps:
        counts.add_step(*step)
    return counts


def run(tokens: Sequence[int], latency_s: float, counts: AcceptanceCounts, times: PhaseTimes | None = None) -> Run:
    return Run((PromptResult(tuple(tokens), 0.5, latency_s, counts, "length"),), times)


@pytest.fixture
def config(make_config: Callable[..., BenchConfig]) -> BenchConfig:
    return make_config(engines=("transformers", "specdec"), max_tokens=4)


@pytest.fixture
def record(config: BenchConfig) -> dict[str, Any]:
    """Two prompts, 4 tokens each: twice and eight times as fast as the baseline, half as fast as the reference."""
    speculative = counted((2, 2, 3))
    plain = counted((0, 0, 1), (0, 0, 1), (0, 0, 1))
    times, plain_times = PhaseTimes(0.5, 0.2, 0.3, 0.1, 1.1), PhaseTimes(0.5, 0, 0.9, 0.3, 1.7)
    measurement = Measurement(
        {
            BASELINE: [run([1, 2, 3, 4], 2.0, plain, plain_times), run([1, 2, 3, 5], 8.0, plain, plain_times)],
            CANDIDATE: [run([1, 2, 3, 4], 1.0, speculative, times), run([1, 2, 3, 4], 1.0, speculative, times)],
            REFERENCE: [run([1, 2, 3, 4], 0.5, speculative), run([1, 2, 3, 4], 0.5, speculative)],
        },
        [1.5, 2.5],
    )
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    return records.build(cell, TINY, config, "1.2.3", "cpu", measurement)


def test_a_record_holds_the_definitions_of_known_numbers(record: dict[str, Any]) -> None:
    expected = {
        "schema_version": 1,
        "engine": "specdec",
        "engine_version": "1.2.3",
        "pair": "tiny-random",
        "target": "tiny",
        "draft": None,
        "method": "ngram",
        "gamma": 2,
        "placement": "same",
        "workload": "smoke",
        "dtype": "float32",
        "device": "cpu",
        "batch_size": 1,
        "num_prompts": 2,
        "temperature": 0.0,
        "seed": 0,
        "num_steps": 2,
        "num_drafted": 4,
        "num_accepted": 4,
        "acceptance_rate": 1.0,
        "acceptance_rate_low": 1.0,
        "acceptance_rate_high": 1.0,
        "per_prompt_drafted": [2, 2],
        "per_prompt_accepted": [2, 2],
        "acceptance_rate_at": [1.0, 1.0],
        "mean_acceptance_length": 3.0,
        "system_efficiency": 1.0,
        "draft_time_per_token_s": 0.1,
        "prefill_time_s": 1.0,
        "bookkeeping_time_s": 0.0,
        "recording_time_s": 0.0,
        "overhead_rate": 0.6 / 2.2,
        "scoring_time_s": 0.6,
        "verification_time_s": 0.2,
        "ttft_s": 0.5,
        "latency_s": 1.0,
        "inter_token_s": 0.5 / 3,
        "throughput_tok_s": 4.0,
        "user_throughput_tok_s": 6.0,
        "device_throughput_tok_s": 4.0,
        "num_devices": 1,
        "speedup": 4.0,
        "speedup_low": 4.0 * 2**-T_1,  # ratios 2 and 8: a standard error of log 2
        "speedup_high": 4.0 * 2**T_1,
        "reference_engine": "transformers",
        "speedup_of_reference": 2.0,
        # a plain step takes 0.4 s, a speculative one 0.6 s for 3 tokens
        "cost_ratio": 0.25,
        "predicted_speedup": 2.0,
        "step_cost_ratio": 1.0,
        "expected_speedup": 2.0,
        "speedup_from_truncation": 0.0,
        "speedup_from_bookkeeping": 0.0,
        "speedup_from_prefill": 1.7 / 1.1 - 2,
        "speedup_from_averaging": 4 - 1.7 / 1.1,
        "per_prompt_latency_s": [1.0, 1.0],
        "per_prompt_tokens": [4, 4],
        "num_outputs_equal": 1,
        "num_outputs_equal_reference": 2,
        "output_sha256": hashlib.sha256(b"[[1,2,3,4],[1,2,3,4]]").hexdigest(),
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value), name


def test_the_closed_form_takes_the_rate_of_the_first_draft_token(config: BenchConfig) -> None:
    """1 of 2 steps accept the first of two tokens, none the second: (1 + 1/2 + 1/4) tokens in 1 + 2 / 4 plain steps."""
    counts, plain = counted((2, 1, 2), (2, 0, 1)), counted((0, 0, 1), (0, 0, 1), (0, 0, 1))
    arms = {
        CANDIDATE: [run([1, 2, 3, 4], 1.0, counts, PhaseTimes(0.5, 0.4, 0.6, 0.2, 1.7))],
        BASELINE: [run([1, 2, 3, 4], 2.0, plain, PhaseTimes(0.5, 0.0, 0.9, 0.3, 1.7))],
    }
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "1", "cpu", Measurement(arms, [1.0]))
    assert record["cost_ratio"] == pytest.approx(0.25)
    assert record["expected_speedup"] == pytest.approx(1.75 / 1.5)


@pytest.mark.parametrize(("short", "inter_token_s"), [([], 1.5 / 3), ([1], 1.5 / 3), ([1, 2], 1.5 / 3 / 2)])
def test_an_output_of_one_token_has_no_time_between_tokens(
    short: list[int], inter_token_s: float, config: BenchConfig
) -> None:
    arms = {CANDIDATE: [run(short, 0.5, counted()), run([1, 2, 3, 4], 2.0, counted((0, 0, 1), (0, 0, 1), (0, 0, 1)))]}
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "1", "cpu", Measurement(arms, [0.5, 2.0]))
    assert record["inter_token_s"] == pytest.approx(inter_token_s)
    assert record["throughput_tok_s"] == pytest.approx((len(short) + 4) / 2.5)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"synthetic_acceptance_rates": (0.5, 0.5)}], ids=str)
def test_outputs_are_compared_only_if_they_should_be_equal(
    options: dict[str, Any], make_config: Callable[..., BenchConfig]
) -> None:
    plain = counted((0, 0, 1), (0, 0, 1), (0, 0, 1))
    outputs = {CANDIDATE: [1, 2, 3, 4], BASELINE: [1, 2, 3, 4], REFERENCE: [1, 2, 3, 3]}
    arms = {arm: [run(output, 1.0, plain)] for arm, output in outputs.items()}
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    for changes, expected in ((options, (None, None)), ({}, (1, 0))):
        record = records.build(cell, TINY, make_config(**changes), "1", "cpu", Measurement(arms, [1.0]))
        assert (record["num_outputs_equal"], record["num_outputs_equal_reference"]) == expected
        rates = changes.get("synthetic_acceptance_rates")
        assert record["synthetic_acceptance_rates"] == (rates and list(rates))


def test_a_record_is_flat(record: dict[str, Any]) -> None:
    values = [item for value in record.values() for item in (value if isinstance(value, list) else [value])]
    assert all(item is None or isinstance(item, str | int | float) for item in values)


def test_a_speedup_is_paired_round_by_round(config: BenchConfig) -> None:
    """Prompts a hundred times apart, each decoded twice as fast: unpaired, the interval would be as wide as that."""
    seconds = [0.1, 10.0, 1.0, 3.0, 0.3, 7.0]
    plain, fast = counted((0, 0, 1), (0, 0, 1), (0, 0, 1)), counted((2, 2, 3))
    arms = {
        CANDIDATE: [run([1, 2, 3, 4], each, fast) for each in seconds],
        BASELINE: [run([1, 2, 3, 4], 2 * each, plain) for each in seconds],
        REFERENCE: [run([1, 2, 3, 4], each / 4, plain) for each in seconds],
    }
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "1", "cpu", Measurement(arms, seconds))
    for name, times in (("speedup", 2.0), ("speedup_of_reference", 4.0)):
        assert [record[f"{name}{end}"] for end in ("", "_low", "_high")] == pytest.approx([times] * 3)


def test_stopping_earlier_does_not_count_as_faster(config: BenchConfig) -> None:
    plain, short = counted((0, 0, 1), (0, 0, 1), (0, 0, 1)), counted((0, 0, 1))
    measurement = Measurement({BASELINE: [run([1, 2, 3, 4], 4.0, plain)], CANDIDATE: [run([1, 2], 2.0, short)]}, [2.0])
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "", "cpu", measurement)
    assert record["speedup"] == 1.0
    assert record["speedup_low"] is record["predicted_speedup"] is record["acceptance_rate"] is None
    assert record["acceptance_rate_low"] is record["speedup_from_prefill"] is None


def test_engines_that_tell_no_counts_have_no_acceptance(config: BenchConfig) -> None:
    silent = Run((PromptResult((1, 2, 3, 4), 0.5, 1.0, None, "length"),))
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "", "cpu", Measurement({CANDIDATE: [silent]}, [1.0]))
    counting = run([1, 2, 3, 4], 1.0, counted((2, 2, 3)))
    partly = records.build(cell, TINY, config, "", "cpu", Measurement({CANDIDATE: [silent, counting]}, [1.0, 1.0]))
    for name in ("num_steps", "per_prompt_drafted", "per_prompt_accepted", "acceptance_rate_low", "step_cost_ratio"):
        assert record[name] is partly[name] is None, name


def test_phases_without_counts_have_no_time_per_token(config: BenchConfig) -> None:
    silent = Run((PromptResult((1, 2, 3, 4), 0.5, 1.0, None, "length"),), PhaseTimes(0.5, 0.2, 0.3, 0.1, 1.1))
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "", "cpu", Measurement({CANDIDATE: [silent]}, [1.0]))
    assert record["draft_time_per_token_s"] is None
    assert record["scoring_time_s"] == 0.3


def test_the_closed_form_is_of_chains_only(config: BenchConfig) -> None:
    counts, plain = counted((2, 1, 2), (2, 0, 1)), counted((0, 0, 1), (0, 0, 1), (0, 0, 1))
    arms = {
        CANDIDATE: [run([1, 2, 3, 4], 1.0, counts, PhaseTimes(0.5, 0.4, 0.6, 0.2, 1.7))],
        BASELINE: [run([1, 2, 3, 4], 2.0, plain, PhaseTimes(0.5, 0.0, 0.9, 0.3, 1.7))],
    }
    cell = Cell("specdec", TINY.name, "tree", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "1", "cpu", Measurement(arms, [1.0]))
    assert record["expected_speedup"] is None
    assert record["predicted_speedup"] == pytest.approx(1.5 / 1.5)


def test_only_vllm_has_engine_options(make_config: Callable[..., BenchConfig]) -> None:
    config, measurement = make_config(vllm_options="{}"), Measurement({CANDIDATE: [run([1], 1.0, counted())]}, [1.0])
    for engine, expected in (("vllm", "{}"), ("vllm-server", "{}"), ("specdec", None)):
        cell = Cell(engine, TINY.name, "ngram", 2, "same", "smoke", 1)
        assert records.build(cell, TINY, config, "1", "cpu", measurement)["engine_options"] == expected


@pytest.mark.parametrize("without", [CANDIDATE, BASELINE])
def test_a_prediction_needs_the_times_of_both_arms(without: str, config: BenchConfig) -> None:
    counts = {CANDIDATE: counted((2, 2, 3)), BASELINE: counted((0, 0, 1), (0, 0, 1), (0, 0, 1))}
    arms = {
        arm: [run([1, 2, 3, 4], 1.0, each, None if arm == without else PhaseTimes(0.5, 0.2, 0.3, 0.1, 1.1))]
        for arm, each in counts.items()
    }
    cell = Cell("specdec", TINY.name, "ngram", 2, "same", "smoke", 1)
    record = records.build(cell, TINY, config, "1", "cpu", Measurement(arms, [1.0]))
    assert record["speedup"] == 1.0
    assert record["predicted_speedup"] is record["cost_ratio"] is record["speedup_from_prefill"] is None


def test_the_terminal_shows_how_a_prediction_becomes_the_measured_speedup(record: dict[str, Any]) -> None:
    lines = printed([record | {"speedup_from_truncation": -1e-9}])
    parts = lines[lines.index("From predicted to measured speed-up: what each effect adds:") :]
    assert row_of(parts, "specdec", "ngram", "2")[3:] == [
        "4.00",
        "[0.00,",
        "26730.60]",
        "2.00",
        "+0.000",
        "+0.000",
    ]
    assert row_of(parts[parts.index("") :], "specdec", "ngram", "2")[3:] == ["-0.455", "+2.455", "2.00"]
    best = lines[lines.index("Best gamma:") :]
    assert row_of(best, "specdec", "ngram")[2:] == ["2", "2.00", "2", "2", "4.00", "[0.00,", "26730.60]"]
    old = {name: value for name, value in record.items() if not name.startswith(("speedup_from", "step_cost"))}
    assert not [line for line in printed([old]) if "Best gamma" in line or "averaging" in line]


def test_the_terminal_shows_energy_if_measured(record: dict[str, Any]) -> None:
    unknown = dict.fromkeys(telemetry.FIELDS)
    assert printed([record | unknown]) == printed([record])  # as were old records
    known = unknown | {"energy_j": 84.0, "energy_per_token_j": 10.5, "energy_per_accepted_token_j": 21.0}
    known |= {"average_power_w": 42.0, "peak_power_w": 700.25, "average_utilisation_rate": 0.5}
    known |= {"peak_memory_bytes": 2.5e9, "peak_temperature_c": 61.0}
    lines = printed([record | known, record | unknown])
    energy = lines[lines.index("Energy, power and memory:") :]
    numbers = ["84.0", "10.500", "21.000", "42.0", "700.2", "50.0%", "2.5", "61"]
    assert row_of(energy, "specdec", "ngram", "2")[3:] == numbers
    assert max(map(len, lines)) <= 80
    assert "idle power" in " ".join(lines)


def test_the_terminal_shows_each_cell_in_80_columns(record: dict[str, Any]) -> None:
    plain = {"method": "autoregressive", "gamma": 0, "speedup": None, "step_cost_ratio": None}
    lines = printed([record, record | plain | {"predicted_speedup": None}])
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).startswith(
        "tiny-random, float32 on cpu; smoke, 2 prompts of up to 4 tokens, batch size 1, greedy; decoded by specdec"
    )
    cells = lines[lines.index("Every cell; --csv has all fields:") :]
    assert row_of(cells, "ngram", "2")[2:] == ["4.0", "1.000", "4.00", "[0.00,", "26730.60]", "2.00", "[2.00,", "2.00]"]
    assert row_of(cells, "autoregressive", "0")[4:6] == ["-", "2.00"]
    assert row_of(cells[cells.index("") :], "ngram", "2")[2:] == [
        *("1", "of", "2", "100.0%", "[100.0%,", "100.0%]", "3.00", "[3.00,", "3.00]"),
    ]


def test_arms_are_interleaved_and_turned_round() -> None:
    calls: list[tuple[str, int]] = []

    def arm(name: str) -> Any:
        def run(index: int) -> None:
            calls.append((name, index))
            at_s[name, index] = time.perf_counter()

        return run

    at_s: dict[tuple[str, int], float] = {}

    class Benchmark:
        stats = type("", (), {"stats": type("", (), {"data": [0.1, 0.2]})})

        def pedantic(self, target: Any, setup: Any, teardown: Any, rounds: int) -> None:
            for _ in range(rounds):
                for step in (setup, target, teardown):
                    step()

    arms = {name: arm(name) for name in (CANDIDATE, REFERENCE, BASELINE)}
    settled: list[int] = []
    measurement = measure(Benchmark(), arms, 2, lambda: settled.append(len(calls)))
    assert measurement.rounds_s == [0.1, 0.2]
    for index, (start_s, end_s) in enumerate(measurement.spans):  # what energy is integrated over: the candidate alone
        within = {name for name in arms if start_s <= at_s[name, index] <= end_s}
        assert within == {CANDIDATE}
    assert len(measurement.spans) == 2
    assert settled == [1, 2, 3, 4, 5, 6]  # once after each arm
    first, second = calls[:3], calls[3:]
    assert [index for _, index in calls] == [0, 0, 0, 1, 1, 1]
    assert [name for name, _ in first] == [name for name, _ in second][::-1]
    assert first[1][0] == CANDIDATE


@pytest.mark.parametrize("counts", [counted((2, 2, 2)), counted((2, 2, 3), (0, 0, 1), (0, 0, 1))])
def test_counters_that_do_not_add_up_fail(counts: AcceptanceCounts) -> None:
    check_counts([run([1, 2, 3, 4], 1.0, counted((2, 2, 3)))], "ngram", 4)
    with pytest.raises(AssertionError):
        check_counts([run([1, 2, 3, 4], 1.0, counts)], "ngram", 4)


def test_the_configuration_is_frozen(config: BenchConfig) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "engine", "placement", "device", "number"),
    [
        ({}, "specdec", "same", "cpu", 1),
        ({}, "specdec", "separate", "cuda", 2),
        ({}, "specdec", "ratio:6:2", "cuda:0", 8),
        ({}, "specdec", "auto", "cuda", None),
        ({"vllm_options": '{"tensor_parallel_size": 4, "data_parallel_size": 2}'}, "vllm", "same", "cuda", 8),
        ({"server_url": Urls((("", "http://localhost:8000"),))}, "vllm-server", "same", "cuda", None),
    ],
)
def test_devices_are_counted_where_they_are_known(
    changes: dict[str, Any],
    engine: str,
    placement: str,
    device: str,
    number: int | None,
    make_config: Callable[..., BenchConfig],
) -> None:
    cell = Cell(engine, TINY.name, "ngram", 2, placement, "smoke", 1)
    assert records.num_devices(cell, make_config(**changes), device) == number
