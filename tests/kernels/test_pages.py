"""Memory in large pages."""

from __future__ import annotations

import pytest
import torch

from specdec.kernels import pages
from specdec.kernels.pages import LargePages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_what_is_held_is_a_copy_aligned_to_cache_lines(dtype: torch.dtype) -> None:
    memory = LargePages()
    given = [torch.arange(size, dtype=dtype).view(-1, 3) for size in (3, 33, 3 * 64)]
    held = [memory.hold(tensor) for tensor in given]
    assert [(each.dtype, each.data_ptr() % 64) for each in held] == [(dtype, 0)] * 3
    given[1].zero_()
    for tensor, expected in zip(held, [given[0], torch.arange(33, dtype=dtype).view(-1, 3), given[2]], strict=True):
        assert torch.equal(tensor, expected)


def test_tensors_share_a_chunk_that_starts_at_a_large_page() -> None:
    memory = LargePages()
    first, second = memory.hold(torch.ones(100)), memory.hold(torch.ones(5))
    assert first.data_ptr() % pages._PAGE == 0
    assert second.data_ptr() == first.data_ptr() + 7 * 64
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_tensor_beyond_the_chunk_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_CHUNK", 256)
    memory = LargePages()
    small, large = memory.hold(torch.ones(10)), memory.hold(torch.full((1000,), 2.0))
    assert small.untyped_storage().data_ptr() != large.untyped_storage().data_ptr()
    assert torch.equal(small, torch.ones(10))
    assert torch.equal(large, torch.full((1000,), 2.0))


def test_without_large_pages_tensors_are_held_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)
    assert torch.equal(LargePages().hold(torch.ones(10)), torch.ones(10))
