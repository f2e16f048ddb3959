"""Where the time of a decode step goes: to drafting, scoring and verification, and to the bookkeeping around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from bench.engines.base import BenchEngine, Run
from bench.records.phases import GAMMA, PHASES, parse
from specdec import PhaseTimes, SamplingParams
from specdec.prompts import encode_to_time

NUM_TOKENS = 64
PROMPT = (
    "Write this function again, with a test for each line of it:\n\ndef sizes(shapes):\n    total = 0\n"
    "    for shape in shapes:\n        total += shape.width * shape.height\n    return total"
)


def runner(engine: BenchEngine, axis: str, rows: int) -> tuple[Callable[[], None], list[Run]]:
    """A function that decodes the prompt in `rows` rows with different seeds, and the list of its results."""
    method, temperature = parse(axis)
    gamma = 0 if method == "autoregressive" else GAMMA
    prompts = [encode_to_time(PROMPT, engine.tokenizer)] * rows
    sampling = [
        SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, ignore_eos=True, seed=row) for row in range(rows)
    ]
    runs: list[Run] = []
    return lambda: runs.append(engine.generate(prompts, method, gamma, sampling)), runs


def shares(axis: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Record fields: seconds per step of the batch over all runs, and the share of each phase.

    Everything except the target's prefill counts as steps: verification includes drawing each prompt's first token, and
    drafting includes a head's prefill.
    """
    method, temperature = parse(axis)
    reported = [run.phase_times for run in runs if run.phase_times is not None]
    times = PhaseTimes(*(sum(getattr(phases, field.name) for phases in reported) for field in fields(PhaseTimes)))
    decode_s = times.total_s - times.prefill_s
    return {
        "method": method,
        "temperature": temperature,
        "gamma": 0 if method == "autoregressive" else GAMMA,
        "num_steps": sum(map(_num_steps, runs)),
        "step_s": decode_s / sum(map(_num_steps, runs)),
        **{f"{phase}_share": getattr(times, f"{phase}_s") / decode_s for phase in PHASES},
    }


def _num_steps(run: Run) -> int:
    """Number of target calls: the maximum over rows, which all start together."""
    return max(result.counts.num_steps for result in run.results if result.counts is not None)
