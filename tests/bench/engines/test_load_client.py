"""Requests are sent at their times, whether or not earlier ones are finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Lock

import pytest

from bench.engines import load_client
from bench.engines.base import EngineError
from bench.engines.load_client import Sent, send_on_time
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
    assert set(server.came) == {0}
