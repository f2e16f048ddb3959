"""What telemetry costs: pairs by hand, and the command as it is documented."""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import Any

import pytest

from bench.measure.telemetry import RaplMeter, UnavailableError
from bench.tools import telemetry_cost
from bench.tools.telemetry_cost import measure, readable


class Meter:
    def __init__(self) -> None:
        self.num_reads = 0

    def read(self) -> int:
        self.num_reads += 1
        return self.num_reads


def test_rounds_are_paired_and_take_turns_in_going_first() -> None:
    """A clock that the work moves: beside the sampler it takes a tenth longer; the machine slows down all along."""
    meter, now_s, order = Meter(), [0.0], list[str]()
    calls = count()

    def work() -> None:
        is_sampled = meter.num_reads % 2 == 1  # between the first and the last sample of a round
        order.append("with" if is_sampled else "without")
        drift = 2.0 ** (next(calls) // 2)
        now_s[0] += drift * (1.1 if is_sampled else 1.0)

    # at so low a rate a round has the two samples at its ends and none between
    cost = measure(work, {"cpu": meter}, hz=0.001, rounds=4, clock=lambda: now_s[0])
    assert order == ["with", "without", "without", "with"] * 2
    assert cost.times.estimate == pytest.approx(1.1)
    assert cost.times.low == pytest.approx(1.1)
    assert cost.num_samples == meter.num_reads == 8
    # a tenth more of 1, 2, 4 and 8, each by two samples
    assert cost.per_sample_s.estimate == pytest.approx(0.1 * (1 + 2 + 4 + 8) / 4 / 2)


def test_cpu_time_of_sampling_is_recorded() -> None:
    """By the thread's own processor time, which a busy machine does not lengthen."""

    class Greedy(Meter):
        def read(self) -> int:
            end_s = time.thread_time() + 0.002
            while time.thread_time() < end_s:
                pass
            return super().read()

    shares = [
        measure(lambda: time.sleep(0.2), {"cpu": meter}, 100, 2, time.perf_counter).cpu_share
        for meter in (Meter(), Greedy())
    ]
    assert shares[1] > 3 * shares[0] > 0


def test_where_nothing_can_be_read_files_take_its_place() -> None:
    with readable({"gpu": "no driver", "cpu": "not read"}) as (meters, what):
        assert isinstance(meters["cpu"], RaplMeter)
        assert meters["cpu"].read() == 0.0
    assert "gpu: no driver; cpu: not read" in what
    with pytest.raises(UnavailableError):
        meters["cpu"].read()  # they are gone
    meter = Meter()
    with readable({"gpu": meter, "cpu": "not read"}) as (meters, what):
        assert (meters, what) == ({"gpu": meter}, "this machine's own: gpu")


def test_the_command_prints_an_interval(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["--pair", "tiny-random", "--rounds", "2", "--max-tokens", "4", "--hz", "100", "--clock", "processor"]
    monkeypatch.setattr(sys, "argv", ["telemetry_cost", *arguments])
    telemetry_cost.main()
    printed = capsys.readouterr().out
    assert "2 pairs of 4 tokens, " in printed
    assert "processor time with over without: " in printed
    monkeypatch.setattr(sys, "argv", ["telemetry_cost", "--rounds", "1"])
    with pytest.raises(SystemExit):
        telemetry_cost.main()
    assert "rounds must be at least 2" in capsys.readouterr().err
