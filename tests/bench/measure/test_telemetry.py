"""Telemetry: integrals of a recorded trace by hand, what cannot be read, and what reading costs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.measure import machine
from bench.measure.paired import measure
from bench.measure.telemetry import (
    FIELDS,
    GpuMeter,
    GpuReading,
    RaplMeter,
    Sampler,
    Trace,
    UnavailableError,
    clip,
    integral,
    meters,
    record,
)

RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "telemetry.json").read_text())
SPANS = [tuple(span) for span in RECORDED["spans"]]
GPU = [(each.pop("time_s"), GpuReading(**each)) for each in RECORDED["gpu"]]
CPU = [(each["time_s"], each["energy_j"]) for each in RECORDED["cpu"]]
times = st.integers(0, 40).map(lambda quarter: quarter / 4)  # whose sums are exact


def test_a_recorded_trace_equals_the_integral_by_hand() -> None:
    values = record(Trace({"gpu": GPU, "cpu": CPU}, cpu_s=0.01, wall_s=4.0), SPANS, 10, num_tokens=50, num_accepted=25)
    # from 10.5 to 11.5 s: 150 W rises to 200 W in half a second, then stays: 87.5 J + 100 J
    # from 12.5 to 13.25 s: 150 W falls to 100 W in half a second, then rises to 150 W in a quarter: 62.5 J + 31.25 J
    assert values == {
        "energy_j": 281.25,
        "energy_per_token_j": 281.25 / 50,
        "energy_per_accepted_token_j": 281.25 / 25,
        "average_power_w": 281.25 / 1.75,
        "peak_power_w": 200.0,  # 300 W came after the last span
        # 0.75 rises to 1 and stays: 0.4375 s + 0.5 s; 0.5 falls to 0, and rises to 0.25: 0.125 s + 0.03125 s
        "average_utilisation_rate": 1.09375 / 1.75,
        "peak_memory_bytes": 2e9 + 0.25 * 7e9,
        "peak_temperature_c": 67.5,
        "energy_reason": None,
        "counted_energy_j": None,  # the GPU that was recorded had no counter
        "energy_difference_rate": None,
        "cpu_energy_j": 40.0 + 7.5,  # 40 J/s for one second, 10 J/s for three quarters
        "cpu_energy_reason": None,
        "telemetry_hz": 10,
        "telemetry_overhead_rate": 0.0025,
    }
    assert tuple(values) == FIELDS


def test_without_a_gpu_the_energy_is_the_processors() -> None:
    values = record(Trace({"cpu": CPU}), SPANS, 10, num_tokens=50, num_accepted=0)
    assert values["energy_j"] == values["cpu_energy_j"] == 47.5
    assert values["average_power_w"] == 47.5 / 1.75
    assert values["energy_per_accepted_token_j"] is values["peak_power_w"] is values["energy_reason"] is None


def test_a_gpu_that_cannot_be_read_is_not_replaced_by_the_processor() -> None:
    values = record(Trace({"cpu": CPU}, {"gpu": "it is lost"}), SPANS, 10, num_tokens=50, num_accepted=None)
    assert values["energy_j"] is values["energy_per_token_j"] is None
    assert (values["cpu_energy_j"], values["energy_reason"]) == (47.5, "it is lost")


@given(st.lists(times, min_size=2, max_size=6, unique=True), st.integers(0, 9), times, times)
def test_the_integral_of_a_straight_line_is_exact_and_spans_add_up(
    sampled: list[float], slope: int, first: float, second: float
) -> None:
    sampled = [0.0, *sorted({*sampled} - {0.0, 10.0}), 10.0]
    points = [(time_s, slope * time_s) for time_s in sampled]
    start, end = sorted((first, second))
    assert integral(clip(points, (start, end))) == pytest.approx(slope * (end**2 - start**2) / 2, abs=1e-9)
    parts = integral(clip(points, (0, start))) + integral(clip(points, (start, 10)))
    assert parts == pytest.approx(integral(points), abs=1e-9)


class Benchmark:
    """Calls what is measured as pytest-benchmark does."""

    stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target: Any, setup: Any, teardown: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            target()
            teardown()


def test_energy_is_of_the_candidates_rounds_alone() -> None:
    """Not of what comes before or after, nor of the other arms, which take most of the time: at 100 W throughout."""
    start_s, lasts_s = time.perf_counter(), {"baseline": 0.02, "candidate": 0.001, "reference": 0.02}
    arms: Any = {name: lambda index, pause_s=pause_s: time.sleep(pause_s) for name, pause_s in lasts_s.items()}
    spans = measure(Benchmark(), arms, 5).spans
    whole_s = time.perf_counter() - start_s
    trace = Trace({"cpu": [(start_s - 60, 0.0), (start_s + 60, 12_000.0)]}, cpu_s=0.01, wall_s=120.0)
    found = record(trace, spans, 10, num_tokens=10, num_accepted=None)
    assert found["energy_j"] == pytest.approx(100 * sum(end - begin for begin, end in spans))
    assert 0.5 <= found["energy_j"] < 100 * (whole_s - 5 * 0.04)
    assert found["average_power_w"] == pytest.approx(100)


def test_outside_of_the_samples_the_line_is_level() -> None:
    points = [(1.0, 5.0), (2.0, 7.0)]
    assert clip(points, (0.0, 3.0)) == [(0.0, 5.0), (1.0, 5.0), (2.0, 7.0), (3.0, 7.0)]
    assert clip(points, (1.25, 1.5)) == [(1.25, 5.5), (1.5, 6.0)]
    with pytest.raises(ValueError, match=r"points=\[\] must not be empty"):
        clip([], (0.0, 1.0))


class FakeNvml:
    """The calls of pynvml that are used; the GPU is lost at the read of that number."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    NVML_FI_DEV_POWER_INSTANT, NVML_TEMPERATURE_GPU = 186, 0

    def __init__(self, lost_at: int | None = None, tells_instant: bool = True, counts: bool = True) -> None:
        self.lost_at, self.tells_instant, self.counts, self.num_reads = lost_at, tells_instant, counts, 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1234":
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        self.num_reads += 1
        if self.num_reads == self.lost_at:
            raise self.NVMLError("GPU is lost")
        return type("", (), {"gpu": 80})

    def nvmlDeviceGetFieldValues(self, handle: str, fields: list[int]) -> Any:
        if not self.tells_instant:
            raise self.NVMLError("Function Not Found")
        return [type("", (), {"nvmlReturn": 0, "value": type("", (), {"uiVal": 250_000})})]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        """In millijoules; 30 J more at each read."""
        if not self.counts:
            raise self.NVMLError_NotSupported("Not Supported")
        return 1_000_000 + 30_000 * self.num_reads

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        return 240_000

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return type("", (), {"used": 3_000})

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 55


def test_a_gpu_is_read_in_si_units() -> None:
    assert GpuMeter(["1234"], FakeNvml()).read() == GpuReading(250.0, 0.8, 3000, 55, 1030.0)
    older = FakeNvml(tells_instant=False, counts=False)
    assert GpuMeter(["GPU-1234"] * 2, older).read() == GpuReading(480.0, 0.8, 6000, 55, None)


def test_the_gpus_own_counter_stands_beside_the_integral_of_its_power() -> None:
    """At 250 W, read every tenth of a second, a counter that rises by 30 J shows a fifth more than 25 J."""
    meter = GpuMeter(["1234"], FakeNvml())
    samples = [(10.0 + 0.1 * number, meter.read()) for number in range(31)]
    values = record(Trace({"gpu": samples}), [(10.45, 11.2), (12.0, 12.25)], 10, num_tokens=50, num_accepted=None)
    assert values["energy_j"] == pytest.approx(250.0)
    assert values["counted_energy_j"] == pytest.approx(300.0)
    assert values["energy_difference_rate"] == pytest.approx(0.2)


def test_one_gpu_without_a_counter_leaves_no_count() -> None:
    samples = [(10.0, GpuReading(250.0, 0.8, 3000, 55, 5.0)), (11.0, GpuReading(250.0, 0.8, 3000, 55))]
    values = record(Trace({"gpu": samples}), [(10.0, 11.0)], 10, num_tokens=50, num_accepted=None)
    assert values["energy_j"] == 250.0
    assert values["counted_energy_j"] is values["energy_difference_rate"] is None


def test_a_gpu_that_vanishes_leaves_a_reason_and_no_part_of_an_energy() -> None:
    with Sampler({"gpu": GpuMeter(["1234"], FakeNvml(lost_at=3)), "cpu": "not read"}, hz=100) as sampler:
        while "gpu" not in sampler.trace.reasons:  # the cell continues
            time.sleep(0.01)
    values = record(sampler.trace, SPANS, 100, num_tokens=50, num_accepted=25)
    assert values["energy_reason"] == "NVML could not read the GPU: GPU is lost"
    assert values["energy_j"] is values["peak_memory_bytes"] is values["cpu_energy_j"] is None


def test_a_gpu_that_nvml_does_not_know_is_named_with_its_reason() -> None:
    with pytest.raises(UnavailableError, match="NVML cannot be used: Not Found; is there an NVIDIA driver"):
        GpuMeter(["other"], FakeNvml())


def test_without_the_package_the_reason_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert meters(["1234"])["gpu"] == "the package nvidia-ml-py is not installed; pip install nvidia-ml-py"
    assert "gpu" not in meters([])


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, of which the first has a part, and something else."""
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1", "dtpm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "max_energy_range_uj").write_text("1000000\n")
        set_energy(tmp_path, name, 900_000)
    return tmp_path


def set_energy(powercap: Path, name: str, microjoules: int) -> None:
    (powercap / name / "energy_uj").write_text(f"{microjoules}\n")


def test_energy_of_all_packages_is_added_and_counters_begin_again(powercap: Path) -> None:
    meter = RaplMeter(powercap)
    assert meter.read() == 0.0
    set_energy(powercap, "intel-rapl:0", 950_000)
    set_energy(powercap, "intel-rapl:0:0", 990_000)  # is part of it
    assert meter.read() == 0.05
    set_energy(powercap, "intel-rapl:1", 100_000)  # from 0.9 J to the maximum of 1 J, and 0.1 J more
    assert meter.read() == 0.25
    set_energy(powercap, "intel-rapl:0", 50_000)
    assert meter.read() == 0.35


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_counters_that_cannot_be_read_are_named(content: str | None, powercap: Path) -> None:
    path = powercap / "intel-rapl:1" / "energy_uj"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(UnavailableError, match=r"intel-rapl:1/energy_uj cannot be read \((No such file|not a number)"):
        RaplMeter(powercap)


def test_a_machine_without_counters_gives_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="has no intel-rapl: the processor"):
        RaplMeter(tmp_path / "nothing")


def test_samples_come_at_most_at_the_rate_and_at_both_ends(powercap: Path) -> None:
    start_s = time.perf_counter()
    with Sampler({"cpu": RaplMeter(powercap)}, hz=50) as sampler:
        set_energy(powercap, "intel-rapl:0", 950_000)
        time.sleep(0.2)
    most = 50 * (time.perf_counter() - start_s) + 2
    samples = sampler.trace.samples["cpu"]
    assert 2 <= len(samples) <= most
    assert [samples[0][1], samples[-1][1]] == [0.0, 0.05]
    assert [when for when, _ in samples] == sorted(when for when, _ in samples)


def test_no_rate_samples_nothing(powercap: Path) -> None:
    with Sampler({"cpu": RaplMeter(powercap)}, hz=0) as sampler:
        pass
    values = record(sampler.trace, SPANS, 0, num_tokens=50, num_accepted=25)
    assert values["energy_j"] is values["telemetry_overhead_rate"] is None
    assert values["energy_reason"] == "telemetry_hz=0: nothing is sampled"


def test_sampling_at_the_default_rate_takes_less_than_a_hundredth_of_a_processor(powercap: Path) -> None:
    """It is the thread's own processor time that counts, which a busy machine does not lengthen."""
    with Sampler({"cpu": RaplMeter(powercap)}, hz=100) as sampler:
        time.sleep(1.0)
    per_sample_s = sampler.trace.cpu_s / (len(sampler.trace.samples["cpu"]) - 2)
    assert 0 < 10 * per_sample_s < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_integral_agrees_with_the_gpus_own_counter() -> None:
    nvml = pytest.importorskip("pynvml")
    (uuid, *_) = machine.gpu_uuids("cuda")
    meter = GpuMeter([uuid])
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    matrix = torch.randn(8192, 8192, device="cuda:0", dtype=torch.bfloat16)

    def work(seconds: float) -> None:
        end_s = time.perf_counter() + seconds
        while time.perf_counter() < end_s:
            for _ in range(10):
                torch.mm(matrix, matrix)
            torch.cuda.synchronize()

    work(2.0)  # the counter moves ten times a second, the clocks settle in one
    with Sampler({"gpu": meter}, hz=10) as sampler:
        before_mj, start_s = nvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter()
        work(10.0)
        after_mj, end_s = nvml.nvmlDeviceGetTotalEnergyConsumption(handle), time.perf_counter()
    values = record(sampler.trace, [(start_s, end_s)], 10, 1, None)
    assert values["energy_j"] == pytest.approx((after_mj - before_mj) / 1000, rel=0.05)
    assert abs(values["energy_difference_rate"]) < 0.05
    assert values["average_utilisation_rate"] > 0.5
    assert values["telemetry_overhead_rate"] < 0.01
