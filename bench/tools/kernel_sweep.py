"""Microbenchmarks of the decode kernels on a GPU: products by tile sizes, attention, and stacks of layers.

    python -m bench.tools.kernel_sweep [--seconds 60] [--out FILE]

One JSON line for each fact, on the screen and in the file. Products are timed as CUDA graphs that go through more
weights than the L2 cache holds, beside cuBLAS; stacks are whole decoders without embedding, of the shapes of Llama 3
8B, Llama 3.2 1B and SmolLM2 135M. `share` is bytes of weights over time, as a share of the bandwidth measured first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from itertools import count, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from specdec.runtime.checks import require_choice
from specdec.runtime.command_line import Parser

CANDIDATES = (
    *((16, 128, 8, 2), (16, 256, 8, 4), (32, 256, 3, 4), (64, 128, 4, 4), (16, 128, 5, 4), (16, 64, 8, 2)),
    *((32, 128, 8, 4), (16, 512, 4, 4), (32, 128, 5, 4), (16, 256, 6, 2), (64, 128, 6, 8), (32, 128, 8, 2)),
)
OVERLAPS = ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1024), (2, 0, 0), (2, 0, 1024), (2, 1, 1024), (2, 2, 1024))
_ROTATED_BYTES = 200 << 20  # of weights that a timed graph goes through


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    vocab: int

    def products(self) -> dict[str, tuple[int, int, bool, bool, bool]]:
        """By name: outputs, inputs, whether a norm comes first, whether it is gated, whether a residual is added."""
        heads = self.num_heads * self.head_dim
        return {
            "qkv": ((self.num_heads + 2 * self.num_kv_heads) * self.head_dim, self.hidden, True, False, False),
            "output": (self.hidden, heads, False, False, True),
            "gate_up": (self.intermediate, self.hidden, True, True, False),
            "down": (self.hidden, self.intermediate, False, False, True),
            "head": (self.vocab, self.hidden, False, False, False),
        }

    @property
    def layer_bytes(self) -> int:
        """Of a layer's weights in 16 bits."""
        return sum(
            2 * n * k * (2 if gated else 1) for name, (n, k, _, gated, _) in self.products().items() if name != "head"
        )


PARTS = ("rows", "products", "attention", "stacks")
SHAPES = {
    "135M": Shape(576, 1536, 9, 3, 64, 30, 49152),
    "1B": Shape(2048, 8192, 32, 8, 64, 16, 128256),
    "8B": Shape(4096, 14336, 32, 8, 128, 32, 128256),
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, help="a file for the lines, too")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--candidates", type=int, default=len(CANDIDATES), help="how many ways to divide a product")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.tools.kernel_sweep needs a GPU; torch sees none")
    with open(options.out or "/dev/null", "a") as file:
        Sweep(file, time.monotonic() + options.seconds, options.candidates).run(
            [SHAPES[name] for name in _words("shapes", options.shapes, SHAPES)], _words("parts", options.parts, PARTS)
        )


def _words(name: str, text: str, known: Iterable[str]) -> list[str]:
    words, known = text.split(","), list(known)
    for word in words:
        require_choice(name, word, known)
    return words


class Sweep:
    """Runs the parts until the time is over, and writes a line for each fact."""

    def __init__(self, file: TextIO, deadline_s: float, num_candidates: int) -> None:
        self._file, self._deadline_s = file, deadline_s
        self._candidates = CANDIDATES[:num_candidates]
        self._bandwidth = measured_bandwidth()

    def run(self, shapes: list[Shape], parts: list[str]) -> None:
        self.write(fact="bandwidth", bytes_per_s=self._bandwidth)
        for part in parts:
            getattr(self, f"_{part}")(shapes)

    def write(self, **values: Any) -> None:
        line = json.dumps(values)
        print(line, flush=True)
        print(line, file=self._file, flush=True)

    def _rows(self, shapes: list[Shape]) -> None:
        """Whether a token's bits depend on how many tokens share a program: two products with a norm between them."""
        from specdec.kernels import triton_layers as layers

        def two(states: Tensor) -> Tensor:
            _, normed = layers.added_product(states, square, None, states, norm, 1e-5)
            return layers.product(normed, weight, activation="silu")

        usual = layers._pipeline
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes = ((128, 2048), (4096, 2048), (2048, 2048), (2048,))
            x, weight, square, norm = (torch.randn(*size, device="cuda").to(dtype) for size in sizes)
            same: dict[int, Any] = {}
            expected = torch.cat([two(row[None]) for row in x])
            for block in (16, 32, 64, 128):
                layers._pipeline = lambda tokens, blocks, *_, block=block: (block, min(2, blocks.num_stages))
                try:
                    same[block] = bool(torch.equal(two(x), expected)), graph_s(partial(two, x), 20)
                except Exception as error:
                    same[block] = f"{type(error).__name__}: {error}"[:200]
            layers._pipeline = usual
            self.write(fact="rows", dtype=str(dtype), bit_identical_and_seconds=same)

    def _products(self, shapes: list[Shape]) -> None:
        from specdec.kernels import triton_layers as layers

        names = {shape: name for name, shape in SHAPES.items()}
        cases = [(shape, name, *each) for shape in shapes for name, each in shape.products().items()]
        tasks = [(*case[2:], candidate) for case in cases for candidate in self._candidates]
        start_s = time.monotonic()
        with ProcessPoolExecutor(14, get_context("spawn")) as pool:
            failures = [each for each in pool.map(compile_product, tasks, chunksize=4) if each]
        self.write(fact="compiled", number=len(tasks), seconds=time.monotonic() - start_s, failures=failures[:3])
        for shape, name, outputs, inputs, normed, gated, added in cases:
            weights = rotated(outputs * (2 if gated else 1), inputs)
            for num_tokens in (1, 5):
                if time.monotonic() > self._deadline_s:
                    return
                x = torch.randn(num_tokens, inputs, device="cuda").bfloat16()
                residual = torch.randn(num_tokens, outputs, device="cuda").bfloat16() if added else None
                num_bytes = weights[0].numel() * 2
                times: dict[str, float] = {}
                for candidate in self._candidates if num_tokens == 1 else self._candidates[:6]:
                    run = over(weights, partial(one_product, x, normed, gated, residual, candidate))
                    try:
                        times[str(candidate)] = graph_s(run, len(weights))
                    except Exception as error:
                        self.write(fact="failed", product=name, candidate=candidate, error=str(error)[:200])
                cublas_s = graph_s(over(weights, partial(torch.nn.functional.linear, x)), len(weights))
                best = min(times, key=lambda key: times[key])
                usual = layers.default_blocks(weights[0].shape[0], inputs, torch.bfloat16, gated)
                self.write(
                    fact="product",
                    shape=names[shape],
                    product=name,
                    tokens=num_tokens,
                    mb=num_bytes / 1e6,
                    best=best,
                    usual=str(astuple(usual)),
                    best_us=times[best] * 1e6,
                    share=num_bytes / times[best] / self._bandwidth,
                    cublas_us=cublas_s * 1e6,
                    us={key: round(value * 1e6, 2) for key, value in sorted(times.items(), key=lambda item: item[1])},
                )

    def _attention(self, shapes: list[Shape]) -> None:
        from specdec.kernels import triton_layers as layers

        names = {shape: name for name, shape in SHAPES.items()}
        for shape in shapes:
            layer = random_layer(shape)
            for width, context in ((1, 256), (1, 2048), (5, 2048), (1, 8192), (5, 8192)):
                if time.monotonic() > self._deadline_s:
                    return
                keys, values = (
                    torch.randn(1, shape.num_kv_heads, 8448, shape.head_dim, device="cuda").bfloat16() for _ in "kv"
                )
                at = places(1, width, context - width, 1 << (context - 1).bit_length())
                scratch = layers._Scratch.of(layer, at, keys)
                scratch.queries.normal_()
                own_s = graph_s(partial(layers._attend, layer, layers.Cached(keys, values), at, scratch), 20)
                group = shape.num_heads // shape.num_kv_heads
                query = torch.randn(1, shape.num_kv_heads, group * width, shape.head_dim, device="cuda").bfloat16()
                mask = torch.zeros(1, 1, group * width, context, device="cuda", dtype=torch.bfloat16)
                attend = torch.nn.functional.scaled_dot_product_attention
                seen = (query, keys[:, :, :context], values[:, :, :context])
                sdpa_s = graph_s(partial(attend, *seen, attn_mask=mask), 20)
                self.write(
                    fact="attention",
                    shape=names[shape],
                    width=width,
                    context=context,
                    own_us=own_s * 1e6,
                    sdpa_us=sdpa_s * 1e6,
                )

    def _stacks(self, shapes: list[Shape]) -> None:
        from specdec.kernels import triton_layers as layers

        names = {shape: name for name, shape in SHAPES.items()}
        for shape in shapes:
            stack = [random_layer(shape) for _ in range(shape.num_layers)]
            size = (2, 1, shape.num_kv_heads, 8448, shape.head_dim)
            caches = [torch.zeros(size, device="cuda", dtype=torch.bfloat16) for _ in stack]
            blocks = [layers.Cached(keys, values) for keys, values in caches]
            cos, sin = (torch.randn(8448, shape.head_dim, device="cuda").bfloat16() for _ in "cs")
            angles = [(cos, sin)] * len(stack)
            for products, others, prefetched in OVERLAPS:
                usual = layers._PRODUCT_OVERLAP, layers._OTHER_OVERLAP, layers._PREFETCHED_BYTES
                layers._PRODUCT_OVERLAP, layers._OTHER_OVERLAP, layers._PREFETCHED_BYTES = products, others, prefetched
                for width, context in ((1, 256), (5, 256), (1, 2048), (9, 2048))[: 2 if products or others else 4]:
                    if time.monotonic() > self._deadline_s:
                        break
                    hidden = torch.randn(1, width, shape.hidden, device="cuda").bfloat16()
                    at = places(1, width, context - width, 1 << (context - 1).bit_length())
                    step_s = graph_s(partial(layers.run_layers, stack, hidden, angles, blocks, at), 1)
                    share = shape.layer_bytes * shape.num_layers / step_s / self._bandwidth
                    values = {"width": width, "context": context, "ms": step_s * 1e3, "share": share}
                    mode = [products, others, prefetched]
                    self.write(fact="stack", shape=names[shape], overlap=mode, **values)
                layers._PRODUCT_OVERLAP, layers._OTHER_OVERLAP, layers._PREFETCHED_BYTES = usual


def measured_bandwidth() -> float:
    """Bytes/s of a copy, read and written, and of a sum, whichever moves more."""
    block = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    copied, numbers = torch.empty_like(block), block.view(torch.float32)
    copy_s, sum_s = graph_s(lambda: copied.copy_(block), 1), graph_s(lambda: numbers.sum(), 1)
    return max(2 * block.numel() / copy_s, block.numel() / sum_s)


def rotated(outputs: int, inputs: int) -> list[Tensor]:
    """Random weights of one shape, more than the L2 cache holds."""
    number = max(2, -(-_ROTATED_BYTES // (2 * outputs * inputs)))
    return [torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) for _ in range(min(number, 200))]


def over(weights: list[Tensor], run: Callable[[Tensor], object]) -> Callable[[], object]:
    """Calls with one weight after the other."""
    index = count()
    return lambda: run(weights[next(index) % len(weights)])


def graph_s(run: Callable[[], object], calls: int, replays: int = 10) -> float:
    """Seconds per call for calls in a CUDA graph, the median of several replays."""
    for _ in range(min(3, calls)):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    for _ in range(2):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    for mark in marks[:-1]:
        mark.record()
        graph.replay()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median_high(float(a.elapsed_time(b)) for a, b in pairwise(marks)) / 1e3 / calls


def random_layer(shape: Shape) -> Any:
    from specdec.kernels.triton_layers import Layer

    sizes = shape.products()

    def weight(name: str) -> tuple[Tensor, None]:
        outputs, inputs, _, gated, _ = sizes[name]
        made = torch.randn(outputs * (2 if gated else 1), inputs, device="cuda", dtype=torch.bfloat16)
        return made.mul_(inputs**-0.5), None

    norm, second_norm = (torch.ones(shape.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    qkv, output, gate_up, down = (weight(name) for name in ("qkv", "output", "gate_up", "down"))
    dimensions = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    scaling = shape.head_dim**-0.5
    return Layer(qkv, output, gate_up, down, norm, second_norm, None, None, 1e-5, scaling, *dimensions)


def places(rows: int, width: int, start: int, extent: int, device: str = "cuda") -> Any:
    """Positions of a call's tokens, which follow `start` others in each row."""
    from specdec.kernels.triton_layers import Places

    positions = torch.arange(start, start + width, device=device).repeat(rows, 1)
    return Places(positions, positions, torch.full((rows,), start, device=device), None, extent)


def one_product(
    x: Tensor, normed: bool, gated: bool, residual: Tensor | None, candidate: tuple[int, ...], weight: Tensor
) -> None:
    """A product as in a layer: after a norm, or with a residual and a norm after it."""
    from specdec.kernels import triton_layers as layers

    blocks = layers.Blocks(*candidate)
    if residual is not None:
        layers.added_product(x, weight, None, residual, weight.view(-1)[: residual.shape[1]], 1e-5, blocks=blocks)
        return
    squares = torch.ones(len(x), x.shape[1] // 16, device=x.device) if normed else None
    activation = "silu" if gated else None
    layers.product(layers.Normed(x, squares, 1e-5), weight, activation=activation, blocks=blocks)


def compile_product(task: tuple[Any, ...]) -> str | None:
    """Compile one product for the cache on the disk; returns why not."""
    outputs, inputs, normed, gated, added, candidate = task
    try:
        with torch.device("cuda"):
            x = torch.empty(1, inputs, dtype=torch.bfloat16)
            weight = torch.empty(outputs * (2 if gated else 1), inputs, dtype=torch.bfloat16)
            residual = torch.empty(1, outputs, dtype=torch.bfloat16) if added else None
        one_product(x, normed, gated, residual, candidate, weight)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{task}: {error}"[:300]
    return None


if __name__ == "__main__":
    main()
