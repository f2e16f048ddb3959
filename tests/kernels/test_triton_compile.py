"""The decode kernels compile for GPUs of three generations, within their registers and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LINE = re.compile(r"sm_(\d+) (\w+) (.*): (\d+) registers, (\d+) B stack, (\d+) B shared")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton==3.6.0")
@pytest.mark.parametrize(("target", "shared_bytes"), [(80, 166_912), (90, 232_448), (120, 101_376)])
def test_kernels_fit(target: int, shared_bytes: int) -> None:
    """In a process of its own: the interpreter, if the other tests run in it, compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.tools.kernel_report", "--targets", str(target)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(found)
    kernels = {match[2] for match in found if match}
    expected = {"_product_kernel", "_attend_kernel", "_combine_kernel", "_scale_kernel", "_norm_kernel"}
    assert kernels == expected | {"_normed_sum_kernel", "_place_kernel"}
    for match in found:
        assert match
        assert int(match[5]) == 0, f"registers are spilled: {match[0]}"
        assert 0 < int(match[4]) <= 255
        assert int(match[6]) <= shared_bytes, match[0]
