"""What a step costs against its size: how many tokens are free, what a long context adds, what the memory allows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.journal import SCHEMA_VERSION
from specdec.models.causal import CausalLM
from specdec.proposers.ngram import LookupIndex
from specdec.sampling import SamplingParams, SamplingState
from specdec.timing import durations_s, synchronise

CONTEXT = 256  # tokens that a sequence has where the sweep is not over contexts
WIDTH = 5  # tokens of a step that verifies four
SWEEPS = {
    "width": (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 64),
    "context": (128, 256, 512, 1024, 2048, 4096, 8000),
    "context-of-5": (128, 256, 512, 1024, 2048, 4096, 8000),
    "batch": (1, 2, 4, 8, 16, 32),
    "vocabulary": (8192, 16384, 32768, 49152, 131072, 262144),
    "ngram": (1000, 10_000, 100_000),
}
SMOKE_SWEEPS = dict.fromkeys(SWEEPS, (16,))


@dataclass(frozen=True, slots=True)
class Sized:
    """Work of one size. run: does it once. bytes_read: from memory, at the least; None if that is not what it costs.

    tokens: that it handles, so that costs can be compared.
    """

    run: Callable[[], object]
    bytes_read: int | None
    tokens: int


def measure(
    benchmark: Any, target: CausalLM, axis: str, size: int, bandwidth: float, identity: dict[str, Any]
) -> tuple[dict[str, Any], list[float]]:
    """The record of a cell and the times of its rounds in seconds. bandwidth: of reading memory, in bytes/s."""
    work = sized(target, axis, size)
    benchmark.pedantic(work.run, rounds=5 if axis == "ngram" else 15, warmup_rounds=2)
    seconds = list(benchmark.stats.stats.data)
    median_s = statistics.median(seconds)
    record = {
        "schema_version": SCHEMA_VERSION,
        **identity,
        "axis": axis,
        "size": size,
        "tokens": work.tokens,
        "median_s": median_s,
        "bytes_read": work.bytes_read,
        "read_bandwidth": bandwidth,
        "roofline_share": work.bytes_read / bandwidth / median_s if work.bytes_read else None,
    }
    return record, seconds


def sized(target: CausalLM, axis: str, size: int) -> Sized:
    """The work of a cell."""
    if axis == "width":
        return _step(target, 1, size, CONTEXT)
    if axis == "batch":
        return _step(target, size, 1, CONTEXT)
    if axis == "context":
        return _step(target, 1, 1, size)
    if axis == "context-of-5":
        return _step(target, 1, WIDTH, size)
    return _sampling(size) if axis == "vocabulary" else _lookup(size)


def _step(target: CausalLM, rows: int, width: int, context: int) -> Sized:
    """A decode step of `width` tokens in each row, behind `context` tokens."""
    context = min(context, target.context_length - width)
    tokens = torch.ones(rows, width, dtype=torch.int64, device=target.device)
    cache = target.allocate(rows, context + width)

    def run() -> None:
        cache.lengths[:] = [context] * rows
        target.forward(tokens, cache)
        synchronise(target.device)

    return Sized(run, target.step_bytes + rows * (context + width) * target.token_bytes, rows * width)


def _sampling(vocab_size: int) -> Sized:
    """The law of five positions at temperature 1 and a draw from each."""
    torch.manual_seed(0)
    logits, uniforms = torch.randn(1, WIDTH, vocab_size), torch.rand(1, WIDTH, dtype=torch.float64)
    state = SamplingState([SamplingParams()], [()], [()], vocab_size, logits.device)
    return Sized(lambda: state.law(logits).draw(uniforms), None, WIDTH)


def _lookup(num_tokens: int) -> Sized:
    """Prompt lookup over a text that grows token by token, as decoding does."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, 5000, (num_tokens,), generator=generator).tolist()
    step = 8

    def run() -> None:
        index, known = LookupIndex(), []
        for start in range(0, num_tokens, step):
            known += text[start : start + step]
            index.continuation(known, WIDTH)

    return Sized(run, None, num_tokens)


def read_bandwidth(device: torch.device, num_bytes: int = 2**29, repeats: int = 9) -> float:
    """Bytes per second at which a block larger than any cache can be read: the best of a few times."""
    block = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / min(durations_s(block.max, device, repeats=repeats, warm_up=0))


def lines(records: list[dict[str, Any]]) -> Iterator[str]:
    """The table of the cost cells, the roofline first."""
    bandwidth = records[0]["read_bandwidth"]
    yield f"memory is read at {bandwidth / 1e9:.1f} GB/s; of that a step's weights and cache reach:"
    yield f"{'axis':14}{'size':>8}{'ms':>10}{'us/token':>10}{'of roofline':>13}"
    for record in records:
        share = record["roofline_share"]
        yield (
            f"{record['axis']:14}{record['size']:>8}{1e3 * record['median_s']:>10.3f}"
            f"{1e6 * record['median_s'] / record['tokens']:>10.1f}{'-' if share is None else f'{share:.0%}':>13}"
        )
