"""Registers, stack and shared memory of the Triton kernels of decode steps, for GPUs that need not be present.

    python -m bench.tools.kernel_report [--targets 80,90,120]

Compiles ahead of time whatever a decode step of the 135M and 8B shapes and of Gemma 3 270M launches, for 1 and for 40
tokens, chains and trees, and reads the resources from the machine code. Stack bytes are spilled registers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.tools.kernel_sweep import SHAPES, Shape, places
from specdec.kernels import triton_layers as layers
from specdec.runtime.command_line import Parser

SHARED_BYTES = {80: 166_912, 90: 232_448, 120: 101_376}  # that a program may have, by compute capability times ten


GEMMA = Shape(640, 2048, 4, 1, 256, 18, 262_144)  # of Gemma 3 270M


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one compiled kernel; stack_bytes: values that did not fit into registers."""

    target: int
    name: str
    variant: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        needs = f"{self.registers} registers, {self.stack_bytes} B stack, {self.shared_bytes} B shared"
        return f"sm_{self.target} {self.name} {self.variant}: {needs}"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(map(str, SHARED_BYTES)), help="compute capabilities, times ten")
    for target in map(int, parser.parse_args(arguments).targets.split(",")):
        for resources in report(target):
            print(resources, flush=True)


def report(target: int) -> list[Resources]:
    """Resources of all that decode steps launch on a GPU of this compute capability, times ten."""
    found: dict[tuple[str, str], Resources] = {}
    for name, shape in {**{name: SHAPES[name] for name in ("135M", "8B")}, "gemma": GEMMA}.items():
        for num_tokens in (1, 40):
            for resources in compiled(target, lambda: _layers(shape, num_tokens)):  # noqa: B023  # called at once
                found.setdefault((resources.name, f"{name} {num_tokens} {resources.variant}"), resources)
    return list(found.values())


def compiled(target: int, work: Callable[[], object]) -> list[Resources]:
    """What `work`, with tensors on the CPU, would launch on such a GPU. It is compiled and not launched."""
    kernels: list[tuple[str, Any]] = []
    with _compiling(target, lambda name, kernel: kernels.append((name, kernel))):
        work()
    return [_resources(target, name, kernel) for name, kernel in kernels]


@contextmanager
def _compiling(target: int, note: Callable[[str, Any], None]) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class NoDevice:
        """What the compiler asks of a GPU's driver."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", target, 32)

        def get_current_device(self) -> int:
            return target  # kernels are kept by device

        def get_current_stream(self, device: int) -> int:
            return 0

    launch, level = JITFunction.run, 1 if target >= 90 else 0

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        note(self.fn.__name__, launch(self, *arguments, grid=grid, warmup=True, **options))

    options = {"OVERLAPS": level, "launch_pdl": True} if level else {"OVERLAPS": 0}
    with (
        patch.object(driver, "_active", NoDevice()),
        patch.object(JITFunction, "run", compile_only),
        patch.object(layers, "overlap", lambda x, wanted: options),
        patch.object(layers, "_shared_bytes", lambda device: SHARED_BYTES[target]),
    ):
        yield


def _layers(shape: Shape, num_tokens: int) -> None:
    """Run a layer, the final norm and the head for steps of num_tokens tokens, as a chain and as a tree."""

    def weight(name: str) -> tuple[torch.Tensor, None]:
        outputs, inputs, _, gated, _ = shape.products()[name]
        return torch.empty(outputs * (1 + gated), inputs, dtype=torch.bfloat16), None

    is_gemma = shape is GEMMA
    norm = torch.ones(shape.hidden, dtype=torch.float32 if is_gemma else torch.bfloat16)
    head_norm = torch.ones(shape.head_dim) if is_gemma else None
    qkv, output, gate_up, down = (weight(name) for name in ("qkv", "output", "gate_up", "down"))
    sizes = (1e-5, 1.0, shape.num_heads, shape.num_kv_heads, shape.head_dim)
    around = {"norm_after_attention": norm, "norm_after_mlp": norm, "softcap": 50.0, "activation": "gelu_tanh"}
    options = around if is_gemma else {"is_interleaved": True}
    layer = layers.Layer(qkv, output, gate_up, down, norm, norm, head_norm, head_norm, *sizes, **options)
    at = places(1, num_tokens, 100, 256, "cpu")
    states = torch.empty(1, num_tokens, shape.hidden, dtype=torch.bfloat16)
    block = torch.empty(1, shape.num_kv_heads, 1024, shape.head_dim, dtype=torch.bfloat16)
    angles = torch.empty(1024, shape.head_dim, dtype=torch.bfloat16)
    cached = layers.Cached(block, block, 512 if is_gemma else None)
    layers.run_layers([layer], states, [(angles, angles)], [cached], at)
    if num_tokens > 1:
        paths = torch.zeros(num_tokens, 3, dtype=torch.int64)
        tree = layers.Places(at.positions, at.places, at.starts, paths, at.extent)
        layers.run_layers([layer], states, [(angles, angles)], [cached], tree)
    head, _ = weight("head")
    layers.product(layers.rms_norm(states[0], norm, 1e-5), head)


def _resources(target: int, name: str, kernel: Any) -> Resources:
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        printed = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert used, printed
    constants = {key[0]: value for key, value in kernel.src.constants.items()}
    wanted = ("NUM_OUTPUTS", "NUM_INPUTS", "BLOCK_TOKENS", "BLOCK_DIM", "IS_TREE", "SIZE")
    names = kernel.src.fn.arg_names
    variant = " ".join(f"{names[i]}={value}" for i, value in constants.items() if names[i] in wanted)
    return Resources(target, name, variant, int(used[1]), int(used[2]), int(kernel.metadata.shared))


if __name__ == "__main__":
    main()
