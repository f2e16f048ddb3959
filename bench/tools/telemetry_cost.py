"""The throughput cost of telemetry: the same prompts decoded in turns with and without the sampler.

`python -m bench.tools.telemetry_cost [--pair PAIR] [--hz HZ] [--rounds N]` prints the ratio of the times
with its interval.
On a machine that other work shares, `--clock processor` with OMP_NUM_THREADS=1 compares processor time, not wall time.
A rate above the default 10 samples a second makes a cost that noise hides visible; it grows with the rate.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import machine, telemetry
from bench.records.intervals import Interval, geometric_mean_interval, mean_difference_interval
from specdec.runtime.command_line import Parser

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PROMPT = "Write a short story about a clockmaker who repairs the same clock every year."


@dataclass(frozen=True, slots=True)
class Cost:
    """times: of rounds with the sampler over those without, paired. per_sample_s: seconds that a sample of all meters
    added. num_samples: of all meters, in all rounds. cpu_share: the sampling thread's own processor time over the time
    that it ran.
    """

    times: Interval
    per_sample_s: Interval
    num_samples: int
    cpu_share: float


def measure(
    work: Callable[[], object], meters: Mapping[str, Any], hz: float, rounds: int, clock: Callable[[], float]
) -> Cost:
    """Do the work once with the sampler and once without in each round; which comes first alternates.

    meters: as for `telemetry.Sampler`. clock: seconds.
    """
    both: list[tuple[float, float]] = []
    num_samples, cpu_s, wall_s = 0, 0.0, 0.0

    def timed() -> float:
        start_s = clock()
        work()
        return clock() - start_s

    for number in range(rounds):
        without_s = timed() if number % 2 else None
        with telemetry.Sampler(meters, hz) as sampler:
            with_s = timed()
        without_s = timed() if without_s is None else without_s
        both.append((with_s, without_s))
        num_samples += sum(map(len, sampler.trace.samples.values()))
        cpu_s, wall_s = cpu_s + sampler.trace.cpu_s, wall_s + sampler.trace.wall_s
    added, each = mean_difference_interval(*zip(*both, strict=True)), rounds * len(meters) / num_samples
    low, high = (None if end is None else end * each for end in (added.low, added.high))
    times = geometric_mean_interval([with_s / without_s for with_s, without_s in both])
    return Cost(times, Interval(added.estimate * each, low, high), num_samples, cpu_s / wall_s)


@contextlib.contextmanager
def readable(found: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The readable meters and their names; if there are none, one that reads files in powercap's format."""
    meters = {name: meter for name, meter in found.items() if not isinstance(meter, str)}
    if meters:
        yield meters, "this machine's own: " + ", ".join(meters)
        return
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "intel-rapl:0"
        package.mkdir()
        for name in ("energy_uj", "max_energy_range_uj"):
            (package / name).write_text("1000000\n")
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.items())
        yield {"cpu": telemetry.RaplMeter(Path(folder))}, f"files in their place, as there are none here ({reasons})"


def main() -> None:
    from bench.catalogue.pairs import catalogue
    from bench.engines import specdec
    from bench.engines.base import LoadOptions
    from specdec import SamplingParams
    from specdec.prompts import encode_to_time

    parser = Parser(prog="python -m bench.tools.telemetry_cost", description=__doc__)
    parser.add_argument("--pair", default="smollm2-135m", choices=sorted(catalogue()), help="what decodes, plainly")
    parser.add_argument("--hz", type=float, default=10.0, help="samples a second")
    parser.add_argument("--rounds", type=int, default=20, help="pairs of runs")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of a run")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="wall time, or this process's own")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.max_tokens < 1 or not 0 < arguments.hz <= 100:
        parser.error("rounds must be at least 2, max-tokens at least 1, and hz above 0 and at most 100")
    pair, device = catalogue()[arguments.pair], machine.resolve_device("auto")
    engine = specdec.load(pair, LoadOptions(pair.dtype, device))
    prompt = encode_to_time(PROMPT, engine.tokenizer)
    sampling = [SamplingParams(temperature=0, max_tokens=arguments.max_tokens, ignore_eos=True)]

    def work() -> None:
        engine.generate([prompt], "autoregressive", 0, sampling)

    work()  # warm
    with readable(telemetry.meters(machine.gpu_uuids(device))) as (meters, what):
        cost = measure(work, meters, arguments.hz, arguments.rounds, CLOCKS[arguments.clock])
    times = cost.times
    print(f"meters: {what}")
    print(
        f"{arguments.rounds} pairs of {arguments.max_tokens} tokens, {cost.num_samples} samples at {arguments.hz:g} Hz"
    )
    print(f"{arguments.clock} time with over without: {times.estimate:.4f} [{times.low:.4f}, {times.high:.4f}]")
    each = cost.per_sample_s
    assert each.low is not None
    assert each.high is not None, "two rounds have an interval"
    print(
        f"a sample of all meters adds {1e3 * each.estimate:.3f} ms [{1e3 * each.low:.3f}, {1e3 * each.high:.3f}], which"
    )
    print(f"ten times a second, the default, is {10 * each.estimate:.2%} of the time")
    print(f"the sampling thread's share of a processor: {cost.cpu_share:.5f}")


if __name__ == "__main__":
    main()
