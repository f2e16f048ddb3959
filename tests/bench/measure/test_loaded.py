"""Load cells in process: the requests that are served, those that are aborted, and the record of both."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import pytest

from bench.campaign.arrivals import Limits, Request
from bench.campaign.config import BenchConfig
from bench.catalogue.pairs import catalogue
from bench.engines.base import LoadOptions, PromptResult, Served, Setup
from bench.engines.specdec import SpecdecEngine, load
from bench.measure import records
from bench.measure.cells import loaded
from bench.measure.context import Context
from bench.measure.load import Window
from bench.measure.load import summary as load_summary
from bench.measure.models import Models
from bench.measure.progress import NOWHERE
from bench.measure.prompts import Prompts
from bench.records.schema import Cell
from specdec import AcceptanceCounts, PhaseTimes, SamplingParams

PAIR = catalogue()["tiny-random"]
PROMPTS = [[n, n + 1, n + 2] for n in range(1, 7)]
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
CELL = Cell("specdec", "tiny-random", "draft_model", 2, "same", "smoke", 2, 0.5)


@pytest.fixture(scope="module")
def engine() -> SpecdecEngine:
    return load(PAIR, LoadOptions("float32", "cpu"))


def test_requests_are_served_as_they_arrive(engine: SpecdecEngine) -> None:
    arrivals_s = [0.0, 0.0, 0.01, 0.02, 0.3, 0.3]
    served = engine.serve(PROMPTS, arrivals_s, Setup("draft_model", 2, 2), [GREEDY] * 6, 600)
    at_once = engine.generate(PROMPTS, "draft_model", 2, [GREEDY] * 6)
    assert [each and each.token_ids for each in served.results] == [each.token_ids for each in at_once.results]
    assert served.wall_s >= 0.3
    assert served.phase_times is not None
    assert served.phase_times.total_s >= 0.3
    for each in served.results:
        assert each is not None
        assert each.queue_s is not None
        assert 0 <= each.queue_s < each.ttft_s <= each.latency_s


def test_latency_is_from_the_arrival_not_from_the_slot(engine: SpecdecEngine) -> None:
    """40 requests arrive at once for one slot: the last one has waited for all others."""
    one = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompts = [PROMPTS[index % 6] for index in range(40)]
    served = engine.serve(prompts, [0.0] * 40, Setup("autoregressive", 0, 1), [one] * 40, 600)
    waits = sorted((each.queue_s, each.ttft_s, each.latency_s) for each in served.results if each)
    assert len(waits) == 40
    for (_, _, before_s), (queue_s, ttft_s, latency_s) in pairwise(waits):
        assert before_s <= queue_s < ttft_s <= latency_s
    assert waits[-1][2] <= served.wall_s
    rows = [Request(0.0, ttft, latency, 2, queue) for queue, ttft, latency in waits]
    table = load_summary([0.0] * 40, rows, Window(0.0, 1.0), Limits(1e9, 1e9))
    assert table["latency_p50_s"] == pytest.approx(median(latency_s for _, _, latency_s in waits))


def test_late_requests_are_aborted_and_the_next_load_is_served(engine: SpecdecEngine) -> None:
    setup, slow = Setup("autoregressive", 0, 1), SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    late = engine.serve(PROMPTS, [0.0] * 6, setup, [slow] * 6, 0.0)
    assert late.results == (None,) * 6
    assert late.phase_times is not None
    after = engine.serve(PROMPTS[:1], [0.0], setup, [GREEDY], 600)
    assert after.results[0] is not None
    expected = engine.generate(PROMPTS[:1], "autoregressive", 0, [GREEDY]).results[0]
    assert after.results[0].token_ids == expected.token_ids


def test_conversations_and_clients_are_served_in_process(engine: SpecdecEngine) -> None:
    """Each request after its predecessor's answer; the last one of each client is due too late to count."""
    after = [None, None, 0, 1, 2, 3]
    served = engine.serve(
        PROMPTS, [0.0, 0.0, 0.0, 0.0, 100.0, 100.0], Setup("ngram", 2, 1), [GREEDY] * 6, 600, after=after, until_s=60.0
    )
    assert served.arrivals_s is not None
    assert served.arrivals_s[:2] == (0.0, 0.0)
    for index, predecessor in ((2, 0), (3, 1)):
        before = served.results[predecessor]
        assert before is not None
        assert served.arrivals_s[index] == served.arrivals_s[predecessor] + before.latency_s
    assert served.results[4:] == served.arrivals_s[4:] == (None, None)
    assert served.wall_s < 60
    expected = engine.generate(PROMPTS[:4], "ngram", 2, [GREEDY] * 4).results
    assert [each and each.token_ids for each in served.results[:4]] == [each.token_ids for each in expected]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_warm_up_fills_every_slot_and_on_a_gpu_meets_every_shape(
    device: str, make_config: Callable[..., BenchConfig], engine: SpecdecEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    serve = SpecdecEngine.serve

    def noted(self: SpecdecEngine, prompts: Any, *arguments: Any) -> Served:
        seen.append((prompts, arguments[2][0].max_tokens))
        return serve(self, prompts, *arguments)

    monkeypatch.setattr(SpecdecEngine, "serve", noted)
    config = make_config(rate=(2.0,), duration=1.0, max_tokens=12)
    context = Context(config, device, Models(config, device), Prompts(config, 2), NOWHERE)
    assert loaded.Loaded(context, {}).warm_up(CELL, engine, [(1, 2), (1, 2, 3, 4), (5,)]) > 0
    slots, shapes = ([(1, 2, 3, 4)] * 2, 8), (2 * [(1, 2), (1, 2, 3, 4), (5,)], 12)
    assert seen == ([slots] if device == "cpu" else [slots, shapes])


def result(ttft_s: float, latency_s: float, accepted: int, queue_s: float | None) -> PromptResult:
    """Nine tokens of the prefill and four steps that drafted two each, with the stated number accepted."""
    counts = AcceptanceCounts(
        num_steps=4, num_drafted=8, num_accepted=accepted, num_emitted=8, num_slots=12, accepted_at=[accepted, 0]
    )
    return PromptResult(tuple(range(9)), ttft_s, latency_s, counts, "length", queue_s)


@pytest.fixture
def config(make_config: Callable[..., BenchConfig]) -> BenchConfig:
    window = (0.0, 1.0)
    return make_config(
        rate=(0.5,), duration=8.0, drain=4.0, ttft_limit=1.0, inter_token_limit=0.5, steady_window=window
    )


def test_a_record_by_hand(config: BenchConfig) -> None:
    # from 0 to 4, from 2 to the end at 12 (not finished), refused at 4 and so never there, from 6 to 10
    results = (result(1.0, 4.0, 4, 0.5), None, None, result(2.0, 4.0, 2, 1.5))
    times = PhaseTimes(prefill_s=1.0, draft_s=0.5, scoring_s=7.0, verification_s=0.5, total_s=12.0)
    served = Served(results, wall_s=12.0, phase_times=times, refused=frozenset({2}))
    record = records.build_load(CELL, PAIR, config, "1.0", "cpu", served, [0.0, 2.0, 4.0, 6.0])
    expected = {
        "rate": 0.5,
        "arrivals": "poisson",
        "duration_s": 8.0,
        "drain_s": 4.0,
        "num_requests": 4,
        "num_finished": 2,
        "num_unfinished": 1,
        "num_refused": 1,
        "num_tokens": 18,
        "offered_rate": 0.5,
        "window_start_s": 0.0,
        "window_end_s": 8.0,
        "num_steady": 4,
        "achieved_rate": 1 / 8,  # the last token came at 10
        "throughput_tok_s": 9 / 8,  # those of the first; the last request's first one comes at 8.0, too late
        "goodput": 1 / 8,
        "concurrency": None,
        "think_time_s": 0.0,
        "is_saturated": True,  # one of four was refused
        "within_limits_rate": 0.25,
        "ttft_p50_s": None,  # between the second and one that never came
        "queue_s": 1.0,
        "mean_num_in_flight": (4 + 6 + 2) / 8,
        "peak_num_in_flight": 2,
        "busy_rate": 0.75,
        "num_drafted": 16,
        "num_accepted": 6,
        "acceptance_rate": 6 / 16,
        "bookkeeping_time_s": None,
        "method": "draft_model",
        "batch_size": 2,
        "per_request_latency_s": [4.0, None, None, 4.0],
        "per_request_tokens": [9, None, None, 9],
    }
    assert {name: record[name] for name in expected} == expected


def test_an_engine_that_tells_less_has_nulls_and_its_mean_wait(config: BenchConfig) -> None:
    answer = PromptResult((1, 2, 3), 0.5, 1.0, None, "length")
    served = Served((answer, answer), wall_s=9.0, queue_s=0.25, peak_send_delay_s=0.001)
    record = records.build_load(CELL, PAIR, config, "1.0", "cpu", served, [0.0, 0.0])
    assert record["queue_s"] == 0.25
    assert record["queue_p50_s"] is record["busy_rate"] is record["acceptance_rate"] is None
    assert (record["peak_send_delay_s"], record["mean_num_in_flight"], record["peak_num_in_flight"]) == (
        0.001,
        2 / 8,
        2,
    )


def test_nothing_finished_is_a_record_of_a_cell_that_stalled(config: BenchConfig) -> None:
    served = Served((None, None), wall_s=12.0)
    record = records.build_load(CELL, PAIR, config, "1.0", "cpu", served, [0.0, 3.0])
    assert (record["num_finished"], record["num_unfinished"], record["goodput"], record["num_tokens"]) == (0, 2, 0, 0)
    assert record["latency_p50_s"] is record["latency_s"] is None
    assert (record["mean_num_in_flight"], record["peak_num_in_flight"]) == (13 / 8, 2)


def test_inconsistent_counters_are_an_error(engine: SpecdecEngine) -> None:
    good = engine.serve(PROMPTS[:2], [0.0, 0.0], Setup("draft_model", 2, 2), [GREEDY] * 2, 600)
    loaded.check(engine, CELL, good, [16, 16], "float32")
    with pytest.raises(AssertionError):
        loaded.check(engine, CELL, good, [16, 17], "float32")  # neither the length nor a stop token
    with pytest.raises(AssertionError, match="must have dtype=bfloat16, but has float32"):
        loaded.check(engine, CELL, good, [16, 16], "bfloat16")
    with pytest.raises(AssertionError):
        loaded.check(engine, CELL, Served(good.results, 1.0, refused=frozenset({1})), [16, 16], "float32")
