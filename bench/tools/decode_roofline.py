"""Decode steps in bfloat16 and with quantized weights, against the time that reading their weights takes.

    OMP_NUM_THREADS=1 python -m bench.tools.decode_roofline --clock processor --json OUT.json

Reads a block of memory and runs a step of each width of each model in turns, so that all of them meet the same load.
On a machine that other work shares, processor time of one thread leaves out the time that others run, but not their
use of memory.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measure import machine
from bench.records.schema import SCHEMA_VERSION
from specdec import Engine
from specdec.kernels.pages import LargePages
from specdec.models.base import prefill, score
from specdec.models.causal import CausalLM
from specdec.models.costs import sample_tokens
from specdec.runtime.command_line import Parser
from specdec.runtime.recording import Recorder

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
BLOCK_BYTES = 2**28  # more than any cache
CONTEXT = 64
BASELINE = "bfloat16"

Times = Mapping[str, Mapping[int, Sequence[float]]]  # seconds of each round, by weights and width


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a bundled model or a GGUF file")
    parser.add_argument("--quantizations", default="q8_0,auto", help="to compare with bfloat16")
    parser.add_argument("--widths", default="1,2,4,8", help="tokens per step")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    names = [BASELINE, *options.quantizations.split(",")]
    targets = {name: _target(options.model, None if name == BASELINE else name) for name in names}
    widths = [int(width) for width in options.widths.split(",")]
    block_s, times = measure(targets, widths, options.rounds, CLOCKS[options.clock])
    step_bytes = {name: target.step_bytes for name, target in targets.items()}
    rows = summary(block_s, times, step_bytes)
    for row in rows:
        print(line(row))
    print(f"{_large_page_bytes() / 2**20:.0f} MB are in large pages")
    if options.json:
        chosen = {name: getattr(options, name) for name in ("model", "rounds", "clock")}
        record = {"schema_version": SCHEMA_VERSION, **chosen, "threads": torch.get_num_threads(), "rows": rows}
        record |= {
            "cpu": machine.cpu_model(),
            "busy": machine.busy().removeprefix("; "),
            "versions": machine.versions(),
            "large_page_bytes": _large_page_bytes(),
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(
    targets: Mapping[str, CausalLM], widths: Sequence[int], rounds: int, clock: Callable[[], float]
) -> tuple[list[float], Times]:
    """Seconds of reading a block of memory in each round, and of a step of each target and width, in turns."""
    block = LargePages().hold(torch.ones(BLOCK_BYTES // 4))
    steps = {name: _step(target, max(widths)) for name, target in targets.items()}
    times: dict[str, dict[int, list[float]]] = {name: {width: [] for width in widths} for name in targets}
    block_s = []
    for _ in range(rounds):
        block_s.append(_seconds(block.sum, clock))
        for name, step in steps.items():
            for width in widths:
                times[name][width].append(_seconds(lambda: step(width), clock))  # noqa: B023  # called at once
    return block_s, times


def summary(block_s: Sequence[float], times: Times, step_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Medians over the rounds, of one row per weights and width.

    read_bandwidth: bytes/s. step_s: seconds. roofline_share: of a step, how long reading its weights takes at that
    bandwidth. speedup: over bfloat16 at the same width. relative_cost: to a step of one token, or of the first width.
    """
    rows = []
    for name, by_width in times.items():
        first = next(iter(by_width.values()))
        for width, seconds in by_width.items():
            bounds = [step_bytes[name] / BLOCK_BYTES * each for each in block_s]
            rows.append(
                {
                    "weights": name,
                    "width": width,
                    "step_bytes": step_bytes[name],
                    "read_bandwidth": BLOCK_BYTES / statistics.median(block_s),
                    "step_s": statistics.median(seconds),
                    "roofline_share": _ratio(bounds, seconds),
                    "speedup": _ratio(times[BASELINE][width], seconds),
                    "relative_cost": _ratio(seconds, first),
                }
            )
    return rows


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['weights']}, {row['width']} tokens: {row['step_s'] * 1e3:.2f} ms, {row['roofline_share']:.0%} of the "
        f"roofline at {row['read_bandwidth'] / 1e9:.1f} GB/s, {row['speedup']:.2f} times as fast as {BASELINE}, "
        f"{row['relative_cost']:.2f} times the first width"
    )


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def _large_page_bytes() -> int:
    """Bytes of this process in large pages: without them, reading is slower."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kilobytes) * 1024 for kilobytes in re.findall(r"AnonHugePages: +(\d+) kB", rollup))


def _target(model: str, quantization: str | None) -> CausalLM:
    target = Engine.load(model, dtype="bfloat16", quantization=quantization).target
    assert isinstance(target, CausalLM), "only decoder-only models are quantized"
    return target


def _step(target: CausalLM, width: int) -> Callable[[int], None]:
    """A function that runs a step of up to `width` tokens after the same context."""
    text, recorder = sample_tokens(target, 1, CONTEXT + width), Recorder(target.device)
    cache = target.allocate(1, recorder.capacity(CONTEXT + width), max_rollback=width)
    prefill(target, text[0][:CONTEXT], cache, 0)
    tokens = torch.tensor(text, device=target.device)[:, CONTEXT:]

    def run(num_tokens: int) -> None:
        cache.num_cached[:] = [CONTEXT]
        score(target, tokens[:, :num_tokens], cache, recorder)

    return run


if __name__ == "__main__":
    main()
