"""Timings of the decode kernels need a GPU; what they are made of does not."""

from __future__ import annotations

import pytest
import torch

from bench.tools.kernel_sweep import SHAPES, main


def test_shapes_are_those_of_the_models() -> None:
    """Parameters of the layers, without embedding and head."""
    numbers = {name: shape.layer_bytes // 2 * shape.num_layers for name, shape in SHAPES.items()}
    assert numbers == {"135M": 106_168_320, "1B": 973_078_528, "8B": 6_979_321_856}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["kernel_sweep"])
    with pytest.raises(SystemExit, match="needs a GPU"):
        main()
