"""Load: arrivals by their distribution, and every number of a record by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers.bench_runs import loaded, printed, row_of
from hypothesis import assume, given
from hypothesis import strategies as st

from bench.analysis.break_even import break_even, highest_rate, pays, speedups, stops_paying
from bench.analysis.saturation import saturation_rate
from bench.campaign import arrivals as arrivals_of_loads
from bench.campaign.arrivals import Limits, Request, arrivals, closed_loop, open_loop, replayed
from bench.measure.load import Window, in_flight, percentile, saturation, summary
from bench.records.intervals import Interval

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
ARRIVALS = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
TABLE = [
    Request(0.0, 0.5, 1.5, 5, 0.1),  # 0.25 s a token: at the limit
    Request(1.0, 1.0, 3.0, 11, 0.2),  # the first token at its limit, then 0.2 s a token
    Request(2.0, 1.5, 2.0, 3, 1.2),  # the first token came late
    None,  # was not finished
    Request(4.0, 0.5, 0.5, 1, 0.0),  # one token: nothing between
    Request(5.0, 0.25, 3.5, 11, 0.0),  # 0.325 s a token: too slow
]


def test_a_table_by_hand() -> None:
    """The whole six seconds: four of the requests end in them, and each of the parts is 0.6 s long."""
    found = summary(ARRIVALS, TABLE, Window(0.0, 6.0), LIMITS)
    counts = {"num_requests": 6, "num_finished": 5, "num_steady": 6, "num_tokens": 31, "offered_rate": 1.0}
    assert {name: found[name] for name in counts} == counts
    assert found["within_limits_rate"] == 0.5
    assert found["goodput"] == 3 / 6
    # ends at 1.5, 4.0, 4.0, 4.5 and 8.5
    assert found["achieved_rate_by_part"] == pytest.approx([0, 0, 1 / 0.6, 0, 0, 0, 2 / 0.6, 1 / 0.6, 0, 0])
    assert found["achieved_rate"] == pytest.approx(4 / 6)
    # the last one emits its first token at 5.25 and ten more until 8.5: 0.75 s of 3.25 s are in the window
    assert found["throughput_tok_s"] == pytest.approx((20 + 1 + 10 * 0.75 / 3.25) / 6)
    # first tokens: 0.25 0.5 0.5 1.0 1.5 and never; between the third and the fourth
    assert found["ttft_p50_s"] == 0.75
    assert found["ttft_s"] == 3.75 / 5
    assert found["ttft_p95_s"] is found["ttft_p99_s"] is None
    # latencies: 0.5 1.5 2.0 3.0 3.5 and never
    assert (found["latency_p50_s"], found["latency_s"]) == (2.5, 10.5 / 5)
    # between tokens: 0.2 0.25 0.25 0.325 and never; the one of a single token is not among them
    assert (found["inter_token_p50_s"], found["inter_token_s"]) == (0.25, pytest.approx(1.025 / 4))
    assert found["user_throughput_tok_s"] == pytest.approx(4 / 1.025)
    assert (found["queue_p50_s"], found["queue_s"]) == (pytest.approx(0.15), pytest.approx(0.3))


def test_warm_up_and_cool_down_are_cut_by_hand() -> None:
    """From 2 to 5 s: the requests of 2, 3 and 4 s count, of which one never ends and one has a single token."""
    found = summary(ARRIVALS, TABLE, Window(2.0, 5.0), LIMITS)
    assert (found["num_requests"], found["num_finished"], found["num_steady"]) == (6, 5, 3)
    assert (found["offered_rate"], found["within_limits_rate"]) == (1.0, pytest.approx(1 / 3))
    assert (found["latency_p50_s"], found["latency_s"]) == (2.0, 1.25)
    assert (found["inter_token_s"], found["inter_token_p50_s"]) == (0.25, None)  # of one that ended, and one that never
    assert found["achieved_rate"] == pytest.approx(3 / 3)  # ends at 4.0, 4.0 and 4.5
    assert found["goodput"] == pytest.approx(2 / 3)  # the request of 2 s was late
    # of the request of 1 s all eleven tokens (2.0 to 4.0), of that of 2 s all three, of that of 4 s its only one
    assert found["throughput_tok_s"] == pytest.approx((11 + 3 + 1) / 3)
    with pytest.raises(ValueError, match=r"a request must arrive from 5.5 to 6 s, but none does"):
        summary(ARRIVALS, TABLE, Window(5.5, 6.0), LIMITS)


def test_tokens_of_a_request_by_hand() -> None:
    """Arrived at 1 s, first token at 2 s, four more until 4 s: every half second."""
    request = Request(1.0, 1.0, 3.0, 5)
    assert request.end_s == 4.0
    assert request.tokens_within(0.0, 10.0) == 5
    assert request.tokens_within(2.0, 3.0) == 1 + 2
    assert request.tokens_within(3.0, 3.5) == 1
    assert request.tokens_within(0.0, 2.0) == request.tokens_within(4.5, 9.0) == 0
    at_once = Request(0.0, 1.0, 1.0, 8)  # all tokens in one event
    assert (at_once.tokens_within(1.0, 2.0), at_once.tokens_within(0.0, 1.0)) == (8, 0)


def test_intervals_of_a_steady_state_by_hand() -> None:
    """A request of one token ends in every second but the last two: 8 of 10 parts have a rate of 1, two of 0.

    Their standard deviation is sqrt(1.6 / 9) = 0.4216; Student's t for nine degrees is 2.2622.
    """
    rows = [Request(index + 0.25, 0.5, 0.5, 1) for index in range(8)]
    found = summary([row.arrival_s for row in rows], rows, Window(0.0, 10.0), LIMITS)
    radius = 2.262157 * math.sqrt(1.6 / 9) / math.sqrt(10)
    for name in ("achieved_rate", "throughput_tok_s"):
        assert found[name] == pytest.approx(0.8)
        assert found[f"{name}_low"] == pytest.approx(0.8 - radius, abs=1e-6)
        assert found[f"{name}_high"] == pytest.approx(0.8 + radius, abs=1e-6)
    # four requests at 4, 2, 4 and 2 tokens per second after the first: 1 / mean of 0.25 0.5 0.25 0.5, and t for three
    rows = [Request(index, 0.5, 0.5 + 4 * between, 5) for index, between in enumerate((0.25, 0.5, 0.25, 0.5))]
    found = summary([row.arrival_s for row in rows], rows, Window(0.0, 10.0), LIMITS)
    radius = 3.182446 * math.sqrt(4 / 3) / math.sqrt(4)
    assert found["user_throughput_tok_s"] == pytest.approx(1 / 0.375)
    assert found["user_throughput_tok_s_high"] == pytest.approx(1 / 0.375 + radius, abs=1e-5)


def test_all_percentiles_exist_if_every_request_finishes() -> None:
    rows = [Request(0.0, 0.1 * n, 0.1 * n, 1) for n in range(1, 102)]
    found = summary([0.0] * 101, rows, Window(0.0, 5.05), LIMITS)
    assert [found[f"latency_p{each}_s"] for each in (50, 95, 99)] == pytest.approx([5.1, 9.6, 10.0])
    assert found["inter_token_s"] is found["inter_token_p50_s"] is found["queue_p50_s"] is None
    assert found["user_throughput_tok_s"] is found["user_throughput_tok_s_low"] is None
    assert found["achieved_rate"] == pytest.approx(50 / 5.05)


def test_a_run_without_finished_cells_is_reported_without_error() -> None:
    found = summary([0.0, 1.0], [None, None], Window(0.0, 4.0), LIMITS)
    assert (found["num_finished"], found["goodput"], found["achieved_rate"], found["offered_rate"]) == (0, 0, 0, 0.5)
    assert found["latency_s"] is found["latency_p50_s"] is None


# -- saturation ------------------------------------------------------------------------------------------------


def served(growth: float, number: int = 20, wave: float = 0.0) -> list[Request]:
    """A request every second, with latencies that grow, and with every other group of two a little slower."""
    return [Request(at, 0.1, 1.0 + growth * at + wave * (at // 2 % 2), 2) for at in map(float, range(number))]


def saturated(rows: list[Request | None], refused: frozenset[int] = frozenset(), **changes: Any) -> dict[str, Any]:
    return saturation([float(at) for at in range(len(rows))], rows, refused, Window(0.0, len(rows)), 100.0, **changes)


def test_growth_of_latency_by_hand() -> None:
    """Twenty requests in ten groups of two, at 0.5, 2.5, ... 18.5 s: the sum of squares around 9.5 s is 330."""
    assert saturated(served(0.5)) == {"latency_growth": 0.5, "latency_growth_low": 0.5, "is_saturated": True}
    assert saturated(served(0.0)) == {"latency_growth": 0.0, "latency_growth_low": 0.0, "is_saturated": False}
    # the means 0, 1, 0, 1, ... are 1 at -7, -3, 1, 5 and 9 s from the middle: slope 5 / 330, eight degrees of freedom
    found = saturated(served(0.0, wave=1.0))
    slope = 5 / 330
    residual = 10 * 0.25 - slope**2 * 330
    low = slope - 2.896459 * math.sqrt(residual / 8 / 330)
    assert found["latency_growth"] == pytest.approx(slope)
    assert found["latency_growth_low"] == pytest.approx(low, abs=1e-6)
    assert not found["is_saturated"]  # it may be chance
    assert saturated(served(0.02))["is_saturated"] is False  # surely grows, but by no more than is allowed
    assert saturated(served(0.03))["is_saturated"] is True


def test_a_request_that_never_ends_has_waited_until_the_end() -> None:
    """Of twenty requests the later half does not end: at 100 s they have waited 90 to 81 s."""
    rows: list[Request | None] = [*served(0.0)[:10], *[None] * 10]
    found = saturated(rows)
    means = [1.0] * 5 + [89.5, 87.5, 85.5, 83.5, 81.5]
    expected = sum((2 * place + 0.5 - 9.5) * mean for place, mean in enumerate(means)) / 330
    assert found["latency_growth"] == pytest.approx(expected)
    assert found["is_saturated"] is True


def test_a_server_that_refuses_does_not_keep_up() -> None:
    rows: list[Request | None] = [*served(0.0)[:18], None, None]
    assert saturated(rows, frozenset({18}))["is_saturated"] is not None
    assert saturated(rows, frozenset({18, 19}))["is_saturated"] is True  # 2 of 20 are more than 5 %
    assert saturated([*served(0.0)[:19], None], frozenset({19}))["is_saturated"] is False  # 1 of 20 is not more


def test_clients_that_wait_and_few_requests_say_nothing_about_saturation() -> None:
    assert set(saturated(served(0.5), is_open=False).values()) == {None}
    assert set(saturated(served(0.5, number=3)).values()) == {None}


def test_requests_in_flight_by_hand() -> None:
    spans = [(0.0, 3.0), (2.0, 4.0), (3.0, 5.0), (8.0, 10.0)]
    # 0 to 2 one, 2 to 3 two, 3 to 4 two others, 4 to 5 one, then none, 8 to 10 one: 2 + 2 + 2 + 1 + 2 over 10 s
    assert in_flight(spans, Window(0.0, 10.0)) == (0.9, 2)
    assert in_flight(spans, Window(3.0, 5.0)) == (1.5, 2)
    assert in_flight(spans, Window(4.0, 9.0)) == (2 / 5, 1)
    assert in_flight([], Window(0.0, 1.0)) == (0.0, 0)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=8), st.integers(0, 10))
def test_in_flight_agrees_with_counting_second_by_second(spans: list[tuple[int, int]], first: int) -> None:
    ends = [(start, start + length) for start, length in spans]
    last = max(first + 1, *(end for _, end in ends))
    counts = [sum(start <= second < end for start, end in ends) for second in range(first, last)]
    found = in_flight([(float(start), float(end)) for start, end in ends], Window(first, last))
    assert found == (pytest.approx(sum(counts) / (last - first)), max(counts))


# -- which request follows which -------------------------------------------------------------------------------


def test_conversations_arrive_at_their_times_by_hand() -> None:
    """Prompts 0 and 1 are a conversation, 2 is another one: three arrivals begin the first, the second, the first."""
    found = open_loop([0.0, 2.0, 3.0], [[0, 1], [2]], 0.5)
    assert found.prompts == (0, 1, 2, 0, 1)
    assert found.arrivals_s == (0.0, 0.5, 2.0, 3.0, 0.5)
    assert found.after == (None, 0, None, None, 3)
    three = open_loop([1.0], [[4, 5, 6]], 2.0)
    assert (three.prompts, three.arrivals_s, three.after) == ((4, 5, 6), (1.0, 2.0, 2.0), (None, 0, 1))


def test_clients_take_turns_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients and three conversations; each has at least four requests, and ends with a whole conversation."""
    monkeypatch.setattr(arrivals_of_loads, "MAX_CLOSED", 8)
    found = closed_loop(2, [[0, 1], [2], [3]], 0.25)
    # client 0 has conversations 0, 2, 1, 0; client 1 has 1, 0, 2
    assert found.prompts == (0, 1, 3, 2, 2, 0, 1, 3)
    assert found.after == (None, 0, 1, 2, None, 4, 5, 6)
    assert found.arrivals_s == (0.0, 0.25, 0.25, 0.25, 0.0, 0.25, 0.25, 0.25)


# -- where speculation stops paying --------------------------------------------------------------------------


def cell(rate: float, latency_p50_s: float | None, within: float = 1.0, **changes: Any) -> dict[str, Any]:
    known = {"rate": rate, "concurrency": None, "latency_p50_s": latency_p50_s, "within_limits_rate": within}
    return known | {"is_saturated": False, "per_request_arrival_s": None} | changes


def test_the_curve_is_the_ratio_at_equal_rates_and_ends_where_it_falls_below_one() -> None:
    plain = [cell(8, 4.0), cell(2, 1.0), cell(4, 2.0), cell(16, None)]
    method = [cell(2, 0.5), cell(4, 1.0), cell(8, 5.0), cell(16, 9.0), cell(32, 1.0)]
    curve = speedups(plain, method)
    assert {at: each and each.estimate for at, each in curve.items()} == {2: 2.0, 4: 2.0, 8: 0.8, 16: None}
    assert {each.low for each in curve.values() if each} == {None}  # single requests are not known
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


def with_latencies(latencies_s: list[float | None], **changes: Any) -> dict[str, Any]:
    """A request every second from -1 s on, of which that at -1 s came before the window; the median is given."""
    arrivals_s = [float(at) for at in range(-1, len(latencies_s) - 1)]
    known = {"per_request_arrival_s": arrivals_s, "per_request_latency_s": latencies_s}
    known |= {"window_start_s": 0.0, "window_end_s": 100.0}
    return cell(2, changes.pop("median")) | known | changes


def test_the_interval_of_a_speed_up_at_equal_arrivals_by_hand() -> None:
    """Ten ratios in the window, of which half are 2 and half are 8: on the scale of log 2 they are 1 and 3, mean 2.

    Their standard deviation is sqrt(10 / 9), and t for nine degrees is 2.262157. The interval is around the ratio of
    the medians of all requests.
    """
    plain = with_latencies([99.0, *[2.0, 8.0] * 5], median=5.0)
    method = with_latencies([1.0, *[1.0] * 10], median=1.0)
    (found,) = speedups([plain], [method]).values()
    assert found is not None
    radius = math.log(2) * 2.262157 * math.sqrt(10 / 9) / math.sqrt(10)
    assert found.estimate == 5.0
    assert found.low == pytest.approx(5 * math.exp(-radius), rel=1e-6)
    assert found.high == pytest.approx(5 * math.exp(radius), rel=1e-6)


def test_a_speed_up_has_no_interval_where_nothing_is_steady() -> None:
    plain, method = (with_latencies([9.0, *[1.0, 2.0] * 5], median=1.5) for _ in range(2))
    for changes in ({"is_saturated": True}, {"per_request_latency_s": [9.0, *[1.0, 2.0] * 4, 1.0, None]}):
        (found,) = speedups([plain | changes], [method]).values()
        assert found == Interval(1.0, None, None)


def test_the_interval_of_a_speed_up_of_clients_by_hand() -> None:
    """Arrivals differ, so medians of groups are compared unpaired: Welch with 18 degrees of freedom, t = 2.100922."""
    changes = {"rate": None, "concurrency": 4, "median": 4.0}
    plain = with_latencies([9.0, *[2.0, 8.0] * 5], **changes)
    method = with_latencies([9.0, *[1.0, 4.0] * 5], **changes | {"median": 2.0})
    method["per_request_arrival_s"] = [at / 2 for at in method["per_request_arrival_s"]]
    curve = speedups([plain], [method])
    assert list(curve) == [4]
    radius = math.log(2) * 2.100922 * math.sqrt(2 * 10 / 9 / 10)
    assert curve[4] is not None
    assert curve[4].estimate == 2.0
    assert curve[4].high == pytest.approx(2 * math.exp(radius), rel=1e-6)


def test_break_even_by_hand() -> None:
    """Logarithms are interpolated: from 2 at 4 requests/s to 0.5 at 16 the ratio is 1 at 8."""
    root = math.sqrt(2)
    found = break_even({4: Interval(2.0, root, 2 * root), 16: Interval(0.5, root / 4, root / 2)})
    assert found == Interval(pytest.approx(8.0), pytest.approx(4 * root), pytest.approx(8 * root))
    open_end = break_even({1: Interval(4.0, 2.0, 8.0), 4: Interval(2.0, 0.5, 8.0), 16: Interval(0.5, 0.1, 2.0)})
    assert open_end == Interval(pytest.approx(8.0), pytest.approx(2.0), None)  # low: 2 at 1 and 1/2 at 4
    assert break_even({4: Interval(2.0, 0.9, 4.0), 16: Interval(0.5, 0.25, 1.0)}) == Interval(8.0, 0.0, 16.0)
    alone = break_even({4: Interval(2.0, None, None), 8: None, 16: Interval(0.5, None, None)})
    assert alone == Interval(8.0, 8.0, 8.0)
    assert break_even({4: Interval(2.0, 1.5, 3.0), 8: None}) is None  # pays at all
    assert break_even({4: Interval(0.5, 0.2, 1.5), 8: Interval(0.4, 0.3, 0.5)}) is None  # at none
    assert break_even({}) is None


# -- where an engine is saturated ------------------------------------------------------------------------------


def swept(rate: float, parts: list[float], *, is_saturated: bool | None) -> dict[str, Any]:
    return {"rate": rate, "is_saturated": is_saturated, "achieved_rate_by_part": parts}


def test_the_saturation_rate_is_the_mean_over_the_saturated_rates_at_the_end() -> None:
    """At 2 a false alarm, at 4 none: parts of 8 and 16 requests/s are 5, 7, 6, 6, whose mean is 6 and deviation
    sqrt(2 / 3); t for three degrees is 3.182446."""
    records = [
        swept(16, [6.0, 6.0], is_saturated=True),
        swept(2, [2.0, 1.0], is_saturated=True),
        swept(4, [4.0, 4.0], is_saturated=False),
        swept(8, [5.0, 7.0], is_saturated=True),
    ]
    found = saturation_rate(records)
    assert found is not None
    radius = 3.182446 * math.sqrt(2 / 3) / math.sqrt(4)
    assert (found.estimate, found.low) == (6.0, pytest.approx(6 - radius, rel=1e-6))
    assert saturation_rate(records[1:3]) is None
    assert saturation_rate([swept(1, [1.0], is_saturated=None)]) is None


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


def test_the_terminal_shows_where_a_sweep_is_saturated_and_ends_paying() -> None:
    """Plain decoding is saturated at 8 and finishes 6 requests a second there; ngram stops paying between 4 and 8."""
    parts = {"achieved_rate_by_part": [6.0, 6.0]}
    records = [
        full(4, "autoregressive", 2.0, 1.0),
        full(4, "ngram", 1.0, 1.0),
        full(8, "autoregressive", 2.0, 0.5) | parts | {"is_saturated": True, "latency_growth": 0.25},
        full(8, "ngram", 4.0, 0.5) | parts | {"is_saturated": False},
    ]
    shown = printed(records)
    text = " ".join(" ".join(shown).split())
    assert "95 % up to 4, 99 % up to 4; saturated at 6.00 [6.00, 6.00] requests/s." in text
    assert "does not pay at 8 requests/s, does at 4; stops paying at 5.66 [5.66, 5.66] requests/s, by interp" in text
    assert "6 requests/s saturate specdec, plain decoding" in text


def test_the_terminal_shows_clients_in_a_table_of_their_own() -> None:
    of_clients = {"rate": None, "concurrency": 2, "arrivals": "closed loop", "think_time_s": 0.5}
    plain = full(2, "autoregressive", 1.0, 1.0)
    records = [plain, plain | of_clients, plain | of_clients | {"concurrency": 4}]
    shown = printed(records)
    table = shown[shown.index("By number of clients:") :]
    assert row_of(table, "2", "123.4")[2:5] == ["57", "of", "60"]
    assert row_of(table, "4", "123.4")[2:5] == ["57", "of", "60"]
    assert "rate 2:" in shown[shown.index("By arrival rate:") : shown.index("By number of clients:")]
    text = " ".join(" ".join(shown).split())
    assert "Clients of a closed loop each send the next request 0.5 s after the answer to the one before" in text
