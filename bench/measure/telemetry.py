"""Power, energy, utilization, memory and temperature while a cell is measured.

A thread samples the GPUs (NVML) and the processor packages (RAPL) at a given rate. Power is integrated over the
candidate's rounds only, with samples interpolated at both ends of each round. Values are those of whole devices: they
include idle power, other programs and the memory of other engines' models. Values that cannot be read are None, with
the reason.

`python -m bench.measure.telemetry` shows what can be read on this machine, and the overhead of sampling.
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
FIELDS = tuple(field.name for field in ENERGY)

Span = tuple[float, float]  # start and end, by time.perf_counter
Points = Sequence[tuple[float, float]]  # (time, value) in order of time, interpolated linearly


class UnavailableError(RuntimeError):
    """A meter cannot be read on this machine, or stopped working; the message is the reason."""


class Meter(Protocol):
    """A device that can be sampled."""

    def read(self) -> Any:
        """The current reading. Raises UnavailableError."""
        ...


@dataclass(frozen=True, slots=True)
class GpuReading:
    """All GPUs of a run: total power and memory, mean utilization, highest temperature.

    energy_j: total of the GPUs' energy counters since the driver was loaded; None if a GPU has no counter.
    """

    power_w: float
    utilisation_rate: float
    memory_bytes: float
    temperature_c: float
    energy_j: float | None = None


class GpuMeter:
    """Reads GPUs by NVML. uuids: as reported by torch. nvml: the module pynvml, of the package nvidia-ml-py."""

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
            utilizations = [nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100 for handle in handles]
            sensor = nvml.NVML_TEMPERATURE_GPU
            return GpuReading(
                sum(map(self._power_w, handles)),
                sum(utilizations) / len(handles),
                sum(nvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles),
                max(nvml.nvmlDeviceGetTemperature(handle, sensor) for handle in handles),
                self._counted_j(),
            )
        except nvml.NVMLError as error:  # for instance, the GPU has fallen off the bus
            raise UnavailableError(f"NVML could not read the GPU: {error}") from error

    def _counted_j(self) -> float | None:
        """Total of the energy counters, which GPUs have since Volta."""
        try:
            return float(sum(map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handles))) / 1000
        except self._nvml.NVMLError_NotSupported:
            return None

    def _power_w(self, handle: Any) -> float:
        """Instantaneous power if the GPU reports it, else that of nvidia-smi, on newer GPUs a mean over one second."""
        nvml = self._nvml
        with contextlib.suppress(nvml.NVMLError):  # drivers without this field
            (value,) = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])
            if value.nvmlReturn == 0:
                return float(value.value.uiVal) / 1000
        return float(nvml.nvmlDeviceGetPowerUsage(handle)) / 1000


class RaplMeter:
    """Energy of all processor packages since creation, in joules, by Linux powercap.

    The counters wrap around within minutes at a hundred watts, so it must be read more often than that.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package (also on AMD), intel-rapl:0:0 a part of it
        self._packages = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]
        if not self._packages:
            raise UnavailableError(f"{powercap} has no intel-rapl: the processor or virtual machine does not expose it")
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
    """Recorded samples: (time, reading) by meter, reasons for missing meters, and the time spent sampling."""

    samples: dict[str, list[tuple[float, Any]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Sampler:
    """A context that samples meters in a thread, and once at the start and at the end.

    meters: by name, a meter or the reason why it is missing. hz: samples per second; 0 disables sampling.
    If a meter fails, its earlier samples are discarded and the reason is kept: a partial energy would be misleading.
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
            due_s = max(due_s + self._period_s, time.perf_counter())  # missed samples are skipped
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
    """The meter "cpu", and "gpu" if there are uuids of GPUs; a string is the reason why a meter is missing."""
    gpu = {"gpu": _meter_or_reason(lambda: GpuMeter(uuids))} if uuids else {}
    return {**gpu, "cpu": _meter_or_reason(RaplMeter)}


def _meter_or_reason(make: Callable[[], Meter]) -> Meter | str:
    try:
        return make()
    except UnavailableError as error:
        return str(error)


def record(trace: Trace, spans: Sequence[Span], hz: float, num_tokens: int, num_accepted: int | None) -> dict[str, Any]:
    """The telemetry fields of a cell's record, `FIELDS`.

    spans: when the candidate ran. num_tokens: emitted tokens. num_accepted: accepted draft tokens, or None if the
    engine does not report them. energy_j is measured on the GPUs, or without GPUs on the processor packages.
    """
    duration_s = sum(end - start for start, end in spans)
    gpu, cpu = trace.samples.get("gpu"), trace.samples.get("cpu")
    cpu_energy_j = sum(_rise(cpu, span) for span in spans) if cpu else None
    values: dict[str, Any] = dict.fromkeys(FIELDS)
    values |= {"telemetry_hz": hz, "telemetry_overhead_rate": trace.cpu_s / trace.wall_s if trace.cpu_s else None}
    values |= {"cpu_energy_j": cpu_energy_j, "cpu_energy_reason": trace.reasons.get("cpu")}
    if gpu:
        values |= _gpu_fields(gpu, spans, duration_s)
    elif cpu_energy_j is not None and "gpu" not in trace.reasons:
        values |= {"energy_j": cpu_energy_j, "average_power_w": cpu_energy_j / duration_s}
    else:
        values["energy_reason"] = trace.reasons.get("gpu") or trace.reasons["cpu"]
    if (energy_j := values["energy_j"]) is not None:
        values["energy_per_token_j"] = energy_j / num_tokens if num_tokens else None
        values["energy_per_accepted_token_j"] = energy_j / num_accepted if num_accepted else None
    return values


def _gpu_fields(
    samples: Sequence[tuple[float, GpuReading]], spans: Sequence[Span], duration_s: float
) -> dict[str, Any]:
    series: dict[str, list[tuple[float, Any]]] = {
        name: [(time_s, getattr(reading, name)) for time_s, reading in samples]
        for name in (field.name for field in fields(GpuReading))
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
    """The part of a piecewise linear curve within a span, with points at both ends.

    Before the first and after the last point the curve is constant. Raises ValueError if there are no points.
    """
    if not points:
        raise ValueError("points=[] must not be empty; sample at least once")
    start_s, end_s = span
    times = [time_s for time_s, _ in points]
    inside = points[bisect_right(times, start_s) : bisect_left(times, end_s)]
    return [(start_s, _value_at(points, times, start_s)), *inside, (end_s, _value_at(points, times, end_s))]


def integral(points: Points) -> float:
    """The area under a piecewise linear curve, by the trapezoidal rule."""
    return sum((after[0] - before[0]) * (before[1] + after[1]) / 2 for before, after in pairwise(points))


def _rise(points: Points, span: Span) -> float:
    """The increase of a counter within a span."""
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
    """Add the prefix GPU-, which NVML uses and torch omits; MIG partitions have the prefix MIG-."""
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def main(hz: float = 10, seconds: float = 5) -> None:
    """Print the readings available on this machine, and the CPU overhead of sampling."""
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
