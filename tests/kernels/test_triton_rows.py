"""Row invariance of the Triton kernels: bit-equal on a GPU; in the interpreter by rounding at the most.

On a GPU they run there; without one in the interpreter: TRITON_INTERPRET=1 pytest tests/kernels/test_triton_rows.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers.row_models import WIDE, WINDOWED, ShiftedPosition, build, fused, subject, texts

from specdec.conformance.rows.arrangements import arrangements
from specdec.conformance.rows.run import compare
from specdec.models.fusion import fuse
from specdec.models.state import windows

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="needs Triton: pip install triton==3.6.0")

from specdec.kernels import triton_layers  # noqa: E402  # only where it can be imported

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter rounds nothing to 16 bits on the way
ALL = arrangements(num_speculative_tokens=4, num_rows=2, chunk=7)
# the interpreter takes a second for a call: there only a batch of speculative steps
TRIED = ALL if ON_GPU else [each for each in ALL if each.num_rows * each.width == 6]
TEXTS = texts(2, 20, 40) if ON_GPU else texts(2, 18, 4)  # beyond the window of 16


@pytest.fixture(autouse=True)
def _short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 16 places and short rings, so that the slow interpreter sees several of them."""
    if not ON_GPU:
        monkeypatch.setattr(triton_layers, "_SPLIT_BYTES", 1)
        monkeypatch.setattr(windows, "_FEWEST_SPARE", 8)


def on_device(kind: str, options: dict[str, Any]) -> Any:
    made = build(kind, options)
    return lambda dtype: made(dtype).to(DEVICE)


@pytest.mark.parametrize(("kind", "options"), [("llama", WIDE), ("gemma3_text", WINDOWED)])
def test_kernels_are_bit_equal(kind: str, options: dict[str, Any]) -> None:
    """The interpreter's products are numpy's, which have no order of sums: there they differ by rounding."""
    made = on_device(kind, options)
    model = made(DTYPE)
    fuse(model)
    assert all(isinstance(layer.kernel, triton_layers.Layer) for layer in model.model.layers)
    record = compare(subject(made, fused), TEXTS, TRIED, DTYPE)
    assert {row["verdict"] for row in record["arrangements"]} <= (
        {"bit-equal"} if ON_GPU else {"bit-equal", "rounding"}
    )


def test_a_planted_bug_is_a_bug() -> None:
    """In steps of chains: a model of which only `forward` is wrapped scores no trees."""
    chains = [each for each in TRIED if not each.num_siblings]
    record = compare(subject(on_device("llama", WIDE), fused, ShiftedPosition), TEXTS, chains, DTYPE)
    assert [row["verdict"] for row in record["arrangements"]][1:] == ["bug"] * len(chains)
