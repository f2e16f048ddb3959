"""Power, energy, utilisation, memory and temperature while a cell is measured.

A thread samples the GPUs (NVML) and the processor packages (RAPL) at a stated rate; what is integrated is exactly the
time of the candidate's rounds, with the samples interpolated at both ends of each. It is the whole device that is
measured, its idle power and whatever else runs on it included; memory is all that is in use on it, other engines'
models included. What cannot be read is None, with the reason.

`python -m bench.measure.telemetry` shows what can be read on this machine, and what reading it costs.
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from bench.records.fields import ENERGY

POWERCAP = Path("/sys/class/powercap")
FIELDS = tuple(each.name for each in ENERGY)

Span = tuple[float, float]  # beginning and end, readings of time.perf_counter
Points = Sequence[tuple[float, float]]  # (time, value), in order of time; between them the value is a straight line


class UnavailableError(RuntimeError):
    """Something cannot be read here, or no longer; the message is the reason."""


class Meter(Protocol):
    """Something that can be read again and again."""

    def read(self) -> Any:
        """Its state now. Raises UnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class GpuReading:
    """All GPUs of a run together: the sums of power and memory, the mean utilisation, the highest temperature.

    energy_j: what their own counters have, which began with the driver; None if one of them has none.
    """

    power_w: float
    utilisation_rate: float
    memory_bytes: float
    temperature_c: float
    energy_j: float | None = None


class GpuMeter:
    """GPUs by NVML. uuids: as torch tells them. nvml: the module pynvml, of the package nvidia-ml-py."""

    def __init__(self, uuids: Sequence[str], nvml: Any = None) -> None:
        self._nvml = nvml or _import_nvml()
        try:
            self._nvml.nvmlInit()
            self._handles = [self._nvml.nvmlDeviceGetHandleByUUID(_nvml_uuid(uuid)) for uuid in uuids]
        except self._nvml.NVMLError as error:
            raise UnavailableError(f"NVML cannot be used: {error}; is there an NVIDIA driver?") from error

    def read(self) -> GpuReading:
        nvml, handles = self._nvml, self._handles
        try:
            utilisations = [nvml.nvmlDeviceGetUtilizationRates(each).gpu / 100 for each in handles]
            sensor = nvml.NVML_TEMPERATURE_GPU
            return GpuReading(
                sum(map(self._power_w, handles)),
                sum(utilisations) / len(handles),
                sum(nvml.nvmlDeviceGetMemoryInfo(each).used for each in handles),
                max(nvml.nvmlDeviceGetTemperature(each, sensor) for each in handles),
                self._counted_j(),
            )
        except nvml.NVMLError as error:  # it fell off the bus, for instance
            raise UnavailableError(f"NVML could not read the GPU: {error}") from error

    def _counted_j(self) -> float | None:
        """GPUs count their energy from Volta on."""
        try:
            return float(sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in self._handles)) / 1000
        except self._nvml.NVMLError_NotSupported:
            return None

    def _power_w(self, handle: Any) -> float:
        """At this moment where the GPU tells; else as nvidia-smi has it, on newer GPUs the mean of the last second."""
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError):  # drivers that know no such field
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1000
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000


class RaplMeter:
    """Energy of all processor packages, in joules since this was made, by Linux's powercap.

    Counters begin again at their maximum, which at a hundred watts takes minutes: it is to be read more often.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (AMD's are called so, too), intel-rapl:0:0 a part of it
        self._packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
        if not self._packages:
            raise UnavailableError(f"{powercap} has no intel-rapl: the processor, or a virtual machine, does not tell")
        self._ranges = [self._number(path / "max_energy_range_uj") for path in self._packages]
        self._last = self._counters()
        self._total_uj = 0

    def read(self) -> float:
        counters = self._counters()
        for now, last, largest in zip(counters, self._last, self._ranges, strict=True):
            self._total_uj += now - last if now >= last else now + largest - last
        self._last = counters
        return self._total_uj / 1e6

    def _counters(self) -> list[int]:
        return [self._number(path / "energy_uj") for path in self._packages]

    def _number(self, path: Path) -> int:
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            cause = error.strerror if isinstance(error, OSError) else "not a number"
            raise UnavailableError(f"{path} cannot be read ({cause}); as root: chmod a+r {path}") from error


@dataclass(slots=True)
class Trace:
    """What was sampled: (time, reading) by meter, the reason where there is none, and what sampling cost."""

    samples: dict[str, list[tuple[float, Any]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Sampler:
    """Samples meters in a thread while it is entered, and once at the beginning and at the end.

    meters: by name, either a meter, or the reason why there is none. hz: samples a second; 0 samples nothing.
    A meter that fails keeps its reason, and nothing of what it said before: part of an energy is none.
    """

    def __init__(self, meters: Mapping[str, Meter | str], hz: float) -> None:
        self.trace = Trace()
        self._meters: dict[str, Meter] = {}
        self._period_s = 1 / hz if hz else 0.0
        for name, meter in meters.items():
            if isinstance(meter, str) or not hz:
                self.trace.reasons[name] = meter if isinstance(meter, str) else "telemetry_hz=0: nothing is sampled"
            else:
                self._meters[name] = meter
                self.trace.samples[name] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    def __enter__(self) -> Sampler:
        self._start_s = time.perf_counter()
        self._sample()
        if self._meters:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._sample()
        self.trace.wall_s = time.perf_counter() - self._start_s

    def _run(self) -> None:
        due_s = time.perf_counter()
        while self._meters:
            due_s = max(due_s + self._period_s, time.perf_counter())  # what was missed is not made up for
            if self._ended.wait(due_s - time.perf_counter()):
                break
            self._sample()
        self.trace.cpu_s = time.thread_time()

    def _sample(self) -> None:
        for name, meter in list(self._meters.items()):
            before_s = time.perf_counter()
            try:
                reading = meter.read()
            except UnavailableError as error:
                self.trace.reasons[name] = str(error)
                del self._meters[name], self.trace.samples[name]
            else:
                self.trace.samples[name].append(((before_s + time.perf_counter()) / 2, reading))


def meters(uuids: Sequence[str]) -> dict[str, Meter | str]:
    """The meter "cpu", and "gpu" for a run that uses GPUs. uuids: theirs."""
    gpu = {"gpu": _made(lambda: GpuMeter(uuids))} if uuids else {}
    return {**gpu, "cpu": _made(RaplMeter)}


def _made(make: Callable[[], Meter]) -> Meter | str:
    try:
        return make()
    except UnavailableError as error:
        return str(error)


def record(trace: Trace, spans: Sequence[Span], hz: float, num_tokens: int, num_accepted: int | None) -> dict[str, Any]:
    """The fields of a cell's record, `FIELDS`.

    spans: when the candidate ran. num_tokens, num_accepted: that it emitted, and accepted of its drafts (None if the
    engine does not tell). energy_j is that of the GPUs, or, in a run without one, of the processor packages.
    """
    duration_s = sum(end - start for start, end in spans)
    gpu, cpu = trace.samples.get("gpu"), trace.samples.get("cpu")
    cpu_energy_j = sum(_rise(cpu, span) for span in spans) if cpu else None
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    values |= {"telemetry_hz": hz, "telemetry_overhead_rate": trace.cpu_s / trace.wall_s if trace.cpu_s else None}
    values |= {"cpu_energy_j": cpu_energy_j, "cpu_energy_reason": trace.reasons.get("cpu")}
    if gpu:
        values |= _of_gpus(gpu, spans, duration_s)
    elif cpu_energy_j is not None and "gpu" not in trace.reasons:
        values |= {"energy_j": cpu_energy_j, "average_power_w": cpu_energy_j / duration_s}
    else:
        values["energy_reason"] = trace.reasons.get("gpu") or trace.reasons["cpu"]
    if (energy_j := values["energy_j"]) is not None:
        values["energy_per_token_j"] = energy_j / num_tokens if num_tokens else None
        values["energy_per_accepted_token_j"] = energy_j / num_accepted if num_accepted else None
    return values


def _of_gpus(samples: Sequence[tuple[float, GpuReading]], spans: Sequence[Span], duration_s: float) -> dict[str, Any]:
    series: dict[str, list[tuple[float, Any]]] = {
        each.name: [(time_s, getattr(reading, each.name)) for time_s, reading in samples] for each in fields(GpuReading)
    }
    counts = all(counted is not None for _, counted in series["energy_j"])
    counted_j = sum(_rise(series["energy_j"], span) for span in spans) if counts else None
    energy_j = sum(integral(clip(series["power_w"], span)) for span in spans)
    busy_s = sum(integral(clip(series["utilisation_rate"], span)) for span in spans)
    return {
        "energy_j": energy_j,
        "average_power_w": energy_j / duration_s,
        "peak_power_w": _peak(series["power_w"], spans),
        "average_utilisation_rate": busy_s / duration_s,
        "peak_memory_bytes": _peak(series["memory_bytes"], spans),
        "peak_temperature_c": _peak(series["temperature_c"], spans),
        "counted_energy_j": counted_j,
        "energy_difference_rate": counted_j / energy_j - 1 if counted_j is not None and energy_j else None,
    }


def clip(points: Points, span: Span) -> list[tuple[float, float]]:
    """The part of a broken line within a span, with points at both ends of it.

    Before the first point and behind the last the line is level. Raises ValueError if there are no points.
    """
    if not points:
        raise ValueError("points=[] must not be empty: nothing was sampled")
    start_s, end_s = span
    times = [time_s for time_s, _ in points]
    inside = points[bisect_right(times, start_s) : bisect_left(times, end_s)]
    return [(start_s, _value_at(points, times, start_s)), *inside, (end_s, _value_at(points, times, end_s))]


def integral(points: Points) -> float:
    """The area under a broken line: the trapezoid rule."""
    return sum((after[0] - before[0]) * (before[1] + after[1]) / 2 for before, after in pairwise(points))


def _rise(points: Points, span: Span) -> float:
    """By how much a counter rose within a span."""
    (_, first), *_, (_, last) = clip(points, span)
    return last - first


def _peak(points: Points, spans: Sequence[Span]) -> float:
    return max(value for span in spans for _, value in clip(points, span))


def _value_at(points: Points, times: Sequence[float], time_s: float) -> float:
    index = bisect_left(times, time_s)
    if index == 0 or index == len(points):
        return points[min(index, len(points) - 1)][1]
    (before_s, before), (after_s, after) = points[index - 1 : index + 1]
    return before + (after - before) * (time_s - before_s) / (after_s - before_s)


def _import_nvml() -> Any:
    try:
        return importlib.import_module("pynvml")
    except ImportError as error:
        raise UnavailableError("the package nvidia-ml-py is not installed; pip install nvidia-ml-py") from error


def _nvml_uuid(uuid: str) -> str:
    """NVML says GPU-..., torch leaves that out; parts of a GPU begin with MIG-."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def main(hz: float = 10, seconds: float = 5) -> None:
    """Print what can be read here, and which share of a processor's time reading it takes."""
    from bench.measure import machine

    device = machine.resolve_device("auto")
    start_s = time.perf_counter()
    with Sampler(meters(machine.gpu_uuids(device)), hz) as sampler:
        time.sleep(seconds)
    values = record(sampler.trace, [(start_s, time.perf_counter())], hz, 1, None)
    for name in FIELDS:
        print(f"{name}: {values[name]}")


if __name__ == "__main__":
    main()
