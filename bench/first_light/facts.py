"""Facts about the machine: versions, GPU, bandwidth, and the cost of kernel launches, CUDA graphs and host waits."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from bench.first_light.attention import BACK_ENDS, Shape, attended
from bench.first_light.report import Report
from bench.measure import machine
from bench.measure.cost import roofline
from specdec.runtime.timing import durations_in_queue_s, durations_s, synchronize

_PACKAGES = ("triton", "gguf", "llguidance", "pytest", "pytest_benchmark", "hypothesis", "scipy", "pynvml", "vllm")
_CARD = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,clocks.sm,temperature.gpu"


def run(report: Report, device: torch.device) -> None:
    """Record all facts; on a CPU, without those about a GPU."""
    report.fact("versions", **_versions(), text=_summary(_versions()))
    report.fact("machine", **machine.information())
    if device.type == "cuda":
        _card(report, device)
    with report.attempt("bandwidth"):
        measured = roofline.measure(device, *(() if device.type == "cuda" else ((2**22,), 3)))
        report.fact("bandwidth", **measured, text=roofline.line(measured))
    with report.attempt("launches"):
        costs = _launches(device)
        text = ", ".join(f"{name} {1e6 * cost_s:.1f} us" for name, cost_s in costs.items())
        report.fact("launches", **costs, text=f"cost of: {text}")
    with report.attempt("attention back ends"):
        _attention(report, device)


def _versions() -> dict[str, Any]:
    installed = [name for name in _PACKAGES if importlib.util.find_spec(name)]
    return {
        **machine.versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "source_sha256": machine.source_sha256(),
        "importable": installed,
        "cpus": os.cpu_count(),
    }


def _summary(versions: dict[str, Any]) -> str:
    names = ("torch", "cuda", "cudnn", "transformers", "cpus", "importable")
    return ", ".join(f"{name} {versions[name]}" for name in names)


def _card(report: Report, device: torch.device) -> None:
    with report.attempt("card"):
        card = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        values = {
            "name": card.name,
            "capability": list(torch.cuda.get_device_capability(device)),
            "num_multiprocessors": card.multi_processor_count,
            "l2_bytes": card.L2_cache_size,
            "free_bytes": free,
            "total_bytes": total,
        }
        text = f"{card.name}, {card.multi_processor_count} SMs, L2 {card.L2_cache_size / 2**20:.0f} MB"
        report.fact("card", **values, text=f"{text}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    with report.attempt("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        report.fact("nvidia-smi", fields=_CARD, values=output, text=output)


def _launches(device: torch.device) -> dict[str, float]:
    """Seconds of the small operations in a decode step."""
    one, many = torch.zeros(1, device=device), 200

    def launch_many() -> None:
        for _ in range(many):
            one.add_(1)

    costs = {
        "a launch": _median_s(launch_many, device) / many,
        "a launch and a wait": _median_s(lambda: one.add_(1), device),
        "reading one number": _median_s(one.item, device),
    }
    if device.type == "cuda":
        pinned, moved = torch.zeros(8, dtype=torch.int64).pin_memory(), torch.zeros(8, dtype=torch.int64, device=device)
        upload = durations_in_queue_s(lambda: moved.copy_(pinned, non_blocking=True), device, repeats=9, warm_up=2)
        costs["an upload"] = statistics.median(upload)
        costs |= _graphs(device, launch_many, many)
    return costs


def _graphs(device: torch.device, launch_many: Callable[[], None], many: int) -> dict[str, float]:
    """Seconds to replay CUDA graphs of one and of many trivial kernels."""
    one = torch.zeros(1, device=device)
    single, chain = captured(lambda: one.add_(1)), captured(launch_many)
    in_queue_s = [
        statistics.median(durations_in_queue_s(g.replay, device, repeats=9, warm_up=2)) for g in (single, chain)
    ]
    return {
        "a graph's replay": in_queue_s[0],
        "a graph's replay and a wait": _median_s(single.replay, device),
        "a graph's node": (in_queue_s[1] - in_queue_s[0]) / (many - 1),
    }


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture a function in a CUDA graph, and replay it once."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median(durations_s(run, device, repeats=15, warm_up=3))


def _attention(report: Report, device: torch.device) -> None:
    """Which back ends support the calls of a decode step, and the strides of their outputs."""
    shape = Shape("8B", num_heads=32, num_kv_heads=8, head_dim=128, extent=256, width=5)
    for dtype in (torch.bfloat16, torch.float32):
        inputs, results = shape.inputs(device, dtype), {}
        for name, back_end in BACK_ENDS.items():
            try:
                output = attended(inputs, back_end)
                synchronize(device)
            except RuntimeError as error:
                results[name] = f"unsupported: {str(error).strip().partition(chr(10))[0]}"
            else:
                results[name] = f"strides {list(output.stride())}"
        report.fact("attention", dtype=str(dtype), shape=list(inputs[0].shape), results=results)
        text = ", ".join(f"{name} {result.partition(':')[0]}" for name, result in results.items())
        report.fact("attention back ends", text=f"attention in {dtype} {list(inputs[0].shape)}: {text}")
