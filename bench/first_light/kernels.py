"""Microbenchmarks of the matrix products and attention of a decode step, in CUDA graphs, as a share of the bandwidth.

`PRODUCTS` and `ATTENTIONS` list the implementations to time, by name.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.first_light.attention import BACK_ENDS, Inputs, Shape, attended
from bench.first_light.facts import captured
from bench.first_light.report import Report
from bench.measure.cost import roofline
from specdec.runtime.timing import durations_in_queue_s

Product = Callable[[Tensor, Tensor], Tensor]  # inputs [M, in], weights [out, in] -> [M, out]
Attention = Callable[[Inputs], Tensor]
PRODUCTS: dict[str, Product] = {"cublas": linear}
ATTENTIONS: dict[str, Attention] = {name: partial(attended, back_end=back_end) for name, back_end in BACK_ENDS.items()}
ROWS = (1, 2, 5, 9, 16)
_CALLS = 20  # minimum number of calls in a graph
_ROTATED_BYTES = 200_000_000  # of weights that calls cycle through: four times the size of an H100's L2 cache


@dataclass(frozen=True, slots=True)
class Layer:
    """One product of a model: weights [outputs, inputs]."""

    model: str
    name: str
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Dimensions of a Llama model, which determine the shapes of its products."""

    model: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int

    def products(self) -> Iterator[Layer]:
        queries = self.num_heads * self.head_dim
        yield Layer(self.model, "qkv", queries + 2 * self.num_kv_heads * self.head_dim, self.hidden)
        yield Layer(self.model, "output", self.hidden, queries)
        yield Layer(self.model, "gate_up", 2 * self.intermediate, self.hidden)
        yield Layer(self.model, "down", self.hidden, self.intermediate)
        yield Layer(self.model, "head", self.vocab, self.hidden)

    def attention(self, extent: int, width: int) -> Shape:
        return Shape(self.model, self.num_heads, self.num_kv_heads, self.head_dim, extent, width)


MODELS = (
    Dimensions("8B", 4096, 14336, 32, 8, 128, 128256),
    Dimensions("1B", 2048, 8192, 32, 8, 64, 128256),
    Dimensions("135M", 576, 1536, 9, 3, 64, 49152),
)
_TINY = Dimensions("tiny", 64, 128, 4, 2, 32, 256)


def run(report: Report, device: torch.device) -> None:
    """Time products by layer and rows, then attention by extent and width, each with its share of the bandwidth."""
    on_gpu = device.type == "cuda"
    models, rows, extents = (MODELS, ROWS, (256, 2048, 8192)) if on_gpu else ((_TINY,), (1, 5), (64,))
    with report.attempt("bandwidth"):
        ceiling = roofline.measure(device, sizes=(2**29,) if on_gpu else (2**22,), repeats=5)["bandwidths"][-1]
    with torch.inference_mode():
        for model in models:
            for layer in model.products():
                with report.attempt(f"{model.model} {layer.name}"):
                    _products(report, device, layer, rows, ceiling)
        for model in models:
            for extent in extents:
                with report.attempt(f"{model.model} attention over {extent}"):
                    _attentions(report, device, model.attention(extent, 1), ceiling)


def _products(report: Report, device: torch.device, layer: Layer, rows: tuple[int, ...], ceiling: float) -> None:
    size = 2 * layer.outputs * layer.inputs
    count = max(2, -(-_ROTATED_BYTES // size)) if device.type == "cuda" else 2
    weights = [_random(device, layer.outputs, layer.inputs) / layer.inputs**0.5 for _ in range(count)]
    seconds: dict[str, dict[int, float]] = {name: {} for name in PRODUCTS}
    for num_rows in rows:
        inputs = _random(device, num_rows, layer.inputs)
        exact = inputs.float() @ weights[0].float().T
        for name, product in PRODUCTS.items():
            _compare(report, f"{name} {layer.model} {layer.name} of {num_rows}", product(inputs, weights[0]), exact)
            calls = [partial(product, inputs, weight) for weight in weights]
            seconds[name][num_rows] = _seconds_per_call(calls, device)
    for name, by_rows in seconds.items():
        report.fact("product", of=name, model=layer.model, layer=layer.name, bytes=size, seconds=by_rows)
        times = ", ".join(f"{n}: {1e6 * s:.1f} us {size / s / ceiling:.0%}" for n, s in by_rows.items())
        shape = f"{layer.outputs}x{layer.inputs}"
        report.fact("products", text=f"{layer.model} {layer.name} {shape} {name} by rows {times}")


def _attentions(report: Report, device: torch.device, shape: Shape, ceiling: float) -> None:
    for width in (1, 5):
        sized = replace(shape, width=width)
        count = max(2, min(_CALLS, _ROTATED_BYTES // sized.num_bytes)) if device.type == "cuda" else 2
        inputs = [sized.inputs(device, torch.bfloat16) for _ in range(count)]
        queries, keys, values, mask = inputs[0]
        exact = attended((queries.float(), keys.float(), values.float(), mask.float()), BACK_ENDS["math"])
        seconds = {}
        for name, attention in ATTENTIONS.items():
            try:
                output = attention(inputs[0])
            except RuntimeError:
                continue  # the part `facts` records the reason
            _compare(report, f"{name} attention {sized.model} over {sized.extent}", output, exact)
            seconds[name] = _seconds_per_call([partial(attention, arguments) for arguments in inputs], device)
        report.fact("attention", model=sized.model, extent=sized.extent, width=width, seconds=seconds)
        times = ", ".join(f"{name} {1e6 * s:.1f} us {sized.num_bytes / s / ceiling:.0%}" for name, s in seconds.items())
        report.fact("attentions", text=f"{sized.model} attention of {width} over {sized.extent}: {times}")


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def _compare(report: Report, name: str, output: Tensor, exact: Tensor) -> None:
    """Record a failed check if the relative error exceeds 2 %; in bfloat16 some tenths of a percent are rounding."""
    error = float((output.float() - exact).norm() / exact.norm())
    if not error < 2e-2:
        report.check(name, False, f"relative error {error:.2g} must be below 0.02")


def _seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds per call, cycling through the calls in a CUDA graph."""
    count = max(_CALLS, len(calls))

    def run() -> None:
        for call in islice(cycle(calls), count):
            call()

    if device.type != "cuda":
        return statistics.median(durations_in_queue_s(run, device, repeats=3, warm_up=1)) / count
    graph = captured(run)
    return statistics.median(durations_in_queue_s(graph.replay, device, repeats=5, warm_up=1, calls=2)) / count
