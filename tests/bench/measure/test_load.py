"""Open-loop load: arrivals by their distribution, and every number of a record by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.bench_runs import loaded, printed, row_of
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.analysis.break_even import highest_rate, pays, ratios, stops_paying
from bench.campaign.arrivals import Limits, Request, arrivals, replayed
from bench.measure.load import in_flight, percentile, summary

LIMITS = Limits(ttft_s=1.0, inter_token_s=0.25)


# -- arrivals ------------------------------------------------------------------------------------------------


def test_constant_arrivals_are_equally_far_apart() -> None:
    assert arrivals(2, 3, "constant", seed=0) == (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert arrivals(0.25, 8, "constant", seed=1) == (0.0, 4.0)
    assert arrivals(0.1, 1, "constant", seed=1) == (0.0,)


def test_a_trace_is_stretched_to_a_mean_rate() -> None:
    """Requests at 10, 10, 12 and 16 s: half a second between them on average at 2 a second, a burst stays a burst."""
    assert replayed([10.0, 10.0, 12.0, 16.0], 2.0, 100.0) == (0.0, 0.0, 0.5, 1.5)
    assert replayed([10.0, 10.0, 12.0, 16.0], 2.0, 1.5) == (0.0, 0.0, 0.5)  # the end is not part of the duration
    assert replayed([3.0], 1.0, 1.0) == (0.0,)
    assert replayed([3.0, 3.0], 1.0, 1.0) == (0.0, 0.0)
    with pytest.raises(ValueError, match="must be in the order of their arrivals; sort its lines"):
        replayed([1.0, 0.5], 1.0, 1.0)


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.sampled_from(["constant", "poisson"]), st.integers(0, 2**32 - 1))
def test_arrivals_are_in_order_and_in_time(rate: float, duration_s: float, process: Any, seed: int) -> None:
    assume(process == "constant" or rate * duration_s > 40)  # none at all has a probability of 4e-18
    times = arrivals(rate, duration_s, process, seed)
    assert all(0 <= time_s < duration_s + 1e-6 for time_s in times)
    assert all(before < after for before, after in pairwise(times))
    if process == "constant":
        assert abs(len(times) - rate * duration_s) <= 1


def test_gaps_of_poisson_arrivals_have_their_distribution() -> None:
    """Kolmogorov and Smirnov's distance of 20,000 gaps, by the bound of Dvoretzky, Kiefer and Wolfowitz in Massart's
    form: a false alarm in 1e-6 of the seeds. Gaps a quarter too long, and equal ones, are seen.
    """
    radius = math.sqrt(math.log(2 / 1e-6) / (2 * 20_000))
    times = arrivals(5, 4200, "poisson", seed=3)[:20_001]
    gaps = np.diff(times)
    assert len(gaps) == 20_000
    assert _distance(gaps, 5) < radius
    exactly_slower = 1.25 * -np.log((np.arange(20_000) + 0.5) / 20_000) / 5
    assert _distance(exactly_slower, 5) > 2 * radius  # so chance cannot hide it
    assert _distance(1.25 * gaps, 5) > radius
    assert _distance(np.full(20_000, 0.2), 5) > radius  # constant gaps are no Poisson process


def _distance(gaps: Any, rate: float) -> float:
    distribution = 1 - np.exp(-rate * np.sort(gaps))
    steps = np.arange(len(gaps) + 1) / len(gaps)
    return float(max(np.max(steps[1:] - distribution), np.max(distribution - steps[:-1])))


def test_another_rate_has_the_same_arrivals_faster_and_another_seed_has_others() -> None:
    slow, fast = arrivals(2, 20, "poisson", 7), arrivals(8, 5, "poisson", 7)
    assert fast == pytest.approx([time_s / 4 for time_s in slow])
    assert arrivals(2, 20, "poisson", 7) == slow != arrivals(2, 20, "poisson", 8)


@pytest.mark.parametrize(
    ("rate", "duration_s", "message"),
    [
        (0, 1, r"rate=0 must be > 0 and finite; give another --rate"),
        (math.inf, 1, "rate=inf must be > 0"),
        (math.nan, 1, "rate=nan must be > 0"),
        (1, 0, "duration_s=0 must be > 0 and finite; give another --duration"),
        (1000, 1000, "rate=1000 for duration=1000 must be at most 100000 requests"),
        (0.001, 1, "rate=0.001 for duration=1 must bring a request, but none arrives with seed=0; raise --duration"),
    ],
)
def test_bad_loads_are_refused(rate: float, duration_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arrivals(rate, duration_s, "poisson", 0)


# -- percentiles ---------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.sampled_from([0, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values: list[float], percent: int) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_percentiles_beyond_finished_requests_are_none() -> None:
    assert percentile([1.0, 2.0, 3.0, math.inf, math.inf], 50) == 3.0
    assert percentile([1.0, 2.0, math.inf, math.inf], 50) is None  # halfway to infinity
    assert percentile([1.0, math.inf, math.inf], 50) is None
    with pytest.raises(ValueError, match=r"values=\[\] must not be empty"):
        percentile([], 50)


# -- the numbers of a record ---------------------------------------------------------------------------------

#        arrival  first  last  tokens  queue
TABLE = [
    Request(0.0, 0.5, 1.5, 5, 0.1),  # 0.25 s a token: at the limit
    Request(1.0, 1.0, 3.0, 11, 0.2),  # the first token at its limit, then 0.2 s a token
    Request(2.0, 1.5, 2.0, 3, 1.2),  # the first token came late
    None,  # was not finished
    Request(4.0, 0.5, 0.5, 1, 0.0),  # one token: nothing between
    Request(5.0, 0.25, 3.5, 11, 0.0),  # 0.325 s a token: too slow
]


def test_a_table_by_hand() -> None:
    found = summary(TABLE, 6.0, LIMITS)
    span_s = 8.5  # the last token came 3.5 s after 5.0
    assert {name: found[name] for name in list(found)[:8]} == {
        "num_requests": 6,
        "num_finished": 5,
        "num_tokens": 31,
        "offered_rate": 1.0,
        "achieved_rate": 5 / span_s,
        "throughput_tok_s": 31 / span_s,
        "goodput": 3 / span_s,
        "within_limits_rate": 0.5,
    }
    # first tokens: 0.25 0.5 0.5 1.0 1.5 and never; between the third and the fourth
    assert found["ttft_p50_s"] == 0.75
    assert found["ttft_s"] == 3.75 / 5
    assert found["ttft_p95_s"] is found["ttft_p99_s"] is None
    # latencies: 0.5 1.5 2.0 3.0 3.5 and never
    assert (found["latency_p50_s"], found["latency_s"]) == (2.5, 10.5 / 5)
    # between tokens: 0.2 0.25 0.25 0.325 and never; the one of a single token is not among them
    assert (found["inter_token_p50_s"], found["inter_token_s"]) == (0.25, pytest.approx(1.025 / 4))
    assert (found["queue_p50_s"], found["queue_s"]) == (pytest.approx(0.15), pytest.approx(0.3))


def test_all_percentiles_exist_if_every_request_finishes() -> None:
    rows = [Request(0.0, 0.1 * n, 0.1 * n, 1) for n in range(1, 102)]
    found = summary(rows, 5.0, LIMITS)
    assert [found[f"latency_p{each}_s"] for each in (50, 95, 99)] == pytest.approx([5.1, 9.6, 10.0])
    assert found["inter_token_s"] is found["inter_token_p50_s"] is found["queue_p50_s"] is None
    assert found["achieved_rate"] == pytest.approx(101 / 10.1)


def test_a_run_without_finished_cells_is_reported_without_error() -> None:
    found = summary([None, None], 4.0, LIMITS)
    assert (found["num_finished"], found["goodput"], found["achieved_rate"], found["offered_rate"]) == (0, 0, 0, 0.5)
    assert found["latency_s"] is found["latency_p50_s"] is None


def test_requests_in_flight_by_hand() -> None:
    # 0 to 2 one, 2 to 3 two, 3 to 4 two others, 4 to 5 one, then none, 8 to 10 one: 2 + 2 + 2 + 1 + 2 over 10 s
    assert in_flight([(0.0, 3.0), (2.0, 4.0), (3.0, 5.0), (8.0, 10.0)]) == (0.9, 2)
    assert in_flight([]) == (0.0, 0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=8))
def test_in_flight_agrees_with_counting_second_by_second(spans: list[tuple[int, int]]) -> None:
    ends = [(start, start + length) for start, length in spans]
    last = max(end for _, end in ends)
    counts = [sum(start <= second < end for start, end in ends) for second in range(last)]
    assert in_flight([(float(start), float(end)) for start, end in ends]) == (
        pytest.approx(sum(counts) / last),
        max(counts),
    )


# -- where speculation stops paying --------------------------------------------------------------------------


def cell(rate: float, latency_p50_s: float | None, within: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {"rate": rate, "latency_p50_s": latency_p50_s, "within_limits_rate": within, **changes}


def test_the_curve_is_the_ratio_at_equal_rates_and_ends_where_it_falls_below_one() -> None:
    plain = [cell(8, 4.0), cell(2, 1.0), cell(4, 2.0), cell(16, None)]
    method = [cell(2, 0.5), cell(4, 1.0), cell(8, 5.0), cell(16, 9.0), cell(32, 1.0)]
    assert ratios(plain, method) == {2: 2.0, 4: 2.0, 8: 0.8, 16: None}
    paid = pays(plain, method)
    assert paid == {2: True, 4: True, 8: False, 16: True}  # at 16 plain decoding did not finish half of them
    assert stops_paying(paid) == (4, 8)
    assert pays([cell(1, 1.0), cell(2, 1.0), cell(3, None)], [cell(1, 1.0), cell(2, None), cell(3, None)]) == {
        1: False,  # equal is no gain
        2: False,
        3: None,
    }
    assert stops_paying({2: False, 4: True}) == (None, 2)
    assert stops_paying({2: True, 4: None, 8: True, 16: None}) == (8, None)
    assert stops_paying({2: None}) == (None, None)


def test_the_highest_rate_within_the_limits_has_all_lower_ones_within_them() -> None:
    records = [cell(8, 1.0, 0.99), cell(2, 1.0, 1.0), cell(4, 1.0, 0.94)]
    assert [highest_rate(records, percent) for percent in (50, 95, 99)] == [8, 2, 2]
    assert highest_rate(records[:1], 100) is None


def full(rate: float, method: str, latency: float | None, within: float) -> dict[str, Any]:
    """A record with everything that the table shows."""
    times = {f"{name}_p{each}_s": latency for name in ("ttft", "inter_token", "latency") for each in (50, 95, 99)}
    limits = {"duration_s": 30.0, "drain_s": 60.0, "ttft_limit_s": 2.0, "inter_token_limit_s": 0.2, "batch_size": 4}
    counts = {"num_requests": 60, "num_finished": 57, "goodput": 1.5, "throughput_tok_s": 123.4}
    changes = limits | counts | times | {"within_limits_rate": within, "mean_num_in_flight": 2.5}
    return loaded(rate, method, 0 if method == "autoregressive" else 4, **changes)


def test_the_terminal_shows_the_curve_and_the_limits() -> None:
    records = [
        full(2, "autoregressive", 1.0, 1.0),
        full(2, "ngram", 0.5, 1.0),
        full(8, "autoregressive", 1.5, 0.96),
        full(8, "ngram", 3.0, 0.5),
        full(16, "ngram", None, 0.1),
    ]
    shown = printed(records)
    assert max(map(len, shown)) <= 80
    table = shown[shown.index("By arrival rate:") :]
    assert row_of(table, "2", "ngram", "4")[3:] == ["2.00", "123.4", "57", "of", "60", "1.50", "100.0%", "2.5"]
    times = table[table.index("") + 1 :]
    assert row_of(times, "2", "ngram", "4")[3:] == ["0.500"] * 3 + ["500.0"] * 3
    assert row_of(times, "16", "ngram", "4")[3:] == ["-"] * 6
    assert row_of(times[times.index("") :], "2", "ngram", "4")[3:] == ["0.500"] * 3
    text = " ".join(" ".join(shown).split())
    assert "tiny, float32 on cpu; smoke, 2 prompts of up to 10 tokens, batch size 4, greedy; decoded by specdec" in text
    assert (
        "arrive for 30 s (poisson arrivals), whether or not earlier ones are finished, and may finish up to 60 s"
        in text
    )
    assert "plain decoding: limits kept by 50 % up to 8, 95 % up to 8, 99 % up to 2" in text
    assert (
        "ngram 4: limits kept by 50 % up to 8, 95 % up to 2, 99 % up to 2; does not pay at 8 requests/s, does at 2"
        in text
    )
    stalled = [full(4, "autoregressive", None, 0.0), full(4, "ngram", 9.0, 0.1), full(4, "eagle", None, 0.0)]
    text = " ".join(" ".join(printed(stalled)).split())
    assert "ngram 4: limits kept by 50 % up to no rate, 95 % up to no rate, 99 % up to no rate; pays up to 4" in text
    assert (
        "eagle 4: limits kept by 50 % up to no rate, 95 % up to no rate, 99 % up to no rate; too few requests" in text
    )
