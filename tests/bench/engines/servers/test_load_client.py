"""Requests are sent at their times, whether or not earlier ones are finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import pytest

from bench.engines.base import EngineError
from bench.engines.following import Following
from bench.engines.servers import load_client
from bench.engines.servers.load_client import Sent, send_on_time
from specdec.servers.errors import BusyError


class Server:
    """Answers once it is released, or never; records the time of each call."""

    def __init__(self) -> None:
        self.free, self.aborted = Event(), Event()
        self.came: dict[int, float] = {}
        self._lock = Lock()

    def __call__(self, index: int, due_s: float) -> int:
        with self._lock:
            self.came[index] = time.perf_counter() - due_s
        while not self.free.wait(0.005):
            if self.aborted.is_set():
                raise EngineError("the connection broke")
        return index

    def send(self, arrivals_s: list[float], limit_s: float) -> Sent[int]:
        return send_on_time(self, arrivals_s, limit_s, self.aborted.set)


@pytest.fixture
def server() -> Server:
    return Server()


def test_arrivals_do_not_wait_for_answers(server: Server) -> None:
    """A closed loop would never send the last one: nothing is answered before it arrives."""

    def answer(index: int, due_s: float) -> int:
        if index == 4:
            server.free.set()
        return server(index, due_s)

    sent = send_on_time(answer, [0.0, 0.01, 0.02, 0.03, 0.04], 60, server.aborted.set)
    assert (sent.results, sent.refused) == ((0, 1, 2, 3, 4), frozenset())
    assert min(server.came.values()) >= 0  # none before its time
    assert sent.peak_delay_s == pytest.approx(max(server.came.values()), abs=0.2)
    assert sent.wall_s >= 0.04


def test_late_requests_are_aborted_without_error(server: Server) -> None:
    def some(index: int, due_s: float) -> int:
        return index if index == 1 else server(index, due_s)

    sent = send_on_time(some, [0.0, 0.0, 0.0], 0.1, server.aborted.set)
    assert (sent.results, sent.refused) == ((None, 1, None), frozenset())
    assert 0.1 <= sent.wall_s < 30


def test_refusals_are_counted_and_not_tried_again() -> None:
    def busy(index: int, due_s: float) -> int:
        if index % 2:
            raise BusyError("answered 503")
        return index

    sent = send_on_time(busy, [0.0] * 5, 60, lambda: None)
    assert (sent.results, sent.refused) == ((0, None, 2, None, 4), {1, 3})


def test_a_client_with_too_much_in_flight_refuses_and_does_not_wait(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_client, "MAX_IN_FLIGHT", 2)
    sent = server.send([0.0, 0.0, 0.0, 0.0], 0.1)
    assert (sent.results, sent.refused, len(server.came)) == ((None,) * 4, {2, 3}, 2)


@pytest.mark.parametrize("arrivals_s", [[0.0, 0.0], [0.0, 0.0, 3600.0]])
def test_a_broken_engine_ends_the_load_at_once(server: Server, arrivals_s: list[float]) -> None:
    """Neither requests in flight nor later ones are waited for."""
    call: Callable[[int, float], int] = server

    def breaking(index: int, due_s: float) -> int:
        if index == 1:
            raise EngineError("the server is gone")
        return call(index, due_s)

    with pytest.raises(EngineError, match="the server is gone"):
        send_on_time(breaking, arrivals_s, 3600, server.aborted.set)
    assert server.aborted.is_set()
    assert set(server.came) <= {0}  # which a thread of its own sends


# -- requests that follow others -------------------------------------------------------------------------------


def test_what_is_due_and_what_is_still_open_by_hand() -> None:
    """Request 1 follows 0 by half a second, 2 follows 1; those that are due from 3 s on do not count."""
    following = Following([0.0, 0.5, 0.5, 2.5], [None, 0, 1, None], until_s=3.0)
    assert following.due_s == {0: 0.0, 3: 2.5}
    assert following.finish(0, 2.0) == [1]
    assert following.due_s[1] == 2.5
    assert following.finish(3, 2.75) == []
    assert not following.is_over  # the second request counts, and has no answer
    assert following.finish(1, 2.75) == [2]  # is due at 3.25, and so only keeps the load up
    assert following.is_over
    assert following.arrivals_s() == (0.0, 2.5, None, 2.5)


def test_those_that_follow_a_refused_request_never_arrive() -> None:
    following = Following([0.0, 0.5], [None, 0], until_s=3.0)
    following.refuse(0)
    assert (following.is_over, following.arrivals_s()) == (True, (0.0, None))


def test_a_client_waits_for_each_answer_and_then_thinks() -> None:
    """Two clients with three requests each, which think for 20 ms: at most two calls in flight, never one too early."""
    spans: dict[int, tuple[float, float, float]] = {}

    def call(index: int, due_s: float) -> int:
        start_s = time.perf_counter()
        time.sleep(0.01)
        spans[index] = (due_s, start_s, time.perf_counter())
        return index

    after = [None, None, 0, 1, 2, 3]
    sent = send_on_time(call, [0.0, 0.0, *[0.02] * 4], 60, lambda: None, after=after)
    assert sent.results == (0, 1, 2, 3, 4, 5)
    assert len(spans) == 6
    for index, predecessor in enumerate(after):
        due_s, start_s, _ = spans[index]
        assert start_s >= due_s
        if predecessor is not None:
            assert due_s - spans[predecessor][2] >= 0.02
    assert sent.arrivals_s[:2] == (0.0, 0.0)
    assert [at is not None and at >= 0.03 for at in sent.arrivals_s[2:]] == [True] * 4


def test_clients_send_until_the_requests_that_count_are_answered() -> None:
    """The first client's first answer takes until 50 ms; the second one asks again and again meanwhile."""
    done = Event()

    def call(index: int, due_s: float) -> int:
        time.sleep(0.05 if index == 0 else 0.001)
        if index == 0:
            done.set()
        return index

    after = [None, None, 0, *range(1, 2), *range(3, 10_000)]
    sent = send_on_time(call, [0.0] * len(after), 60, lambda: None, after=after, until_s=0.02)
    assert done.is_set()
    counted = [index for index, at in enumerate(sent.arrivals_s) if at is not None]
    assert {0, 1} < set(counted)
    assert 2 not in counted  # it was due after 50 ms
    assert [sent.results[index] for index in counted] == counted
    assert all(result is None for index, result in enumerate(sent.results) if index not in counted)


def test_a_refused_client_stops() -> None:
    def busy(index: int, due_s: float) -> int:
        if index == 0:
            raise BusyError("answered 503")
        return index

    sent = send_on_time(busy, [0.0] * 4, 60, lambda: None, after=[None, None, 0, 1])
    assert (sent.results, sent.refused, sent.arrivals_s[2]) == ((None, 1, None, 3), {0}, None)


def test_a_stalled_server_is_charged_with_the_whole_wait() -> None:
    """Coordinated omission: a server stalls for 0.2 s while requests come every 40 ms, and answers all of them at the
    end of the stall. A client that measured from the moment of sending, one request after the other, would see one
    slow request and four fast ones; from the times at which they were due, the waits fall evenly.
    """
    stalled_until_s = time.perf_counter() + 0.2
    mutex = Lock()

    def latency_s(index: int, due_s: float) -> float:
        with mutex:  # the server has one slot
            time.sleep(max(0.0, stalled_until_s - time.perf_counter()))
            return time.perf_counter() - due_s

    start_s = time.perf_counter()
    sent = send_on_time(latency_s, [0.04 * index for index in range(5)], 60, lambda: None)
    for index, found_s in enumerate(sent.results):
        assert found_s is not None
        assert found_s >= stalled_until_s - start_s - 0.04 * index - 0.02  # clocks of the start differ slightly


def test_a_client_that_is_late_itself_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for three requests that are due at once: the later calls start late, and are measured from their due
    time."""
    monkeypatch.setattr(load_client, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))

    def latency_s(index: int, due_s: float) -> float:
        time.sleep(0.05)
        return time.perf_counter() - due_s

    sent = send_on_time(latency_s, [0.0] * 3, 60, lambda: None)
    waits = sorted(each for each in sent.results if each is not None)
    assert [wait >= 0.05 * place for place, wait in enumerate(waits, 1)] == [True] * 3
    assert sent.peak_delay_s >= 0.1


def test_an_error_that_is_no_engines_is_raised() -> None:
    def wrong(index: int, due_s: float) -> int:
        raise KeyError("choices")

    with pytest.raises(KeyError, match="choices"):
        send_on_time(wrong, [0.0, 0.0], 3600, lambda: None)
