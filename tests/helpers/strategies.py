"""Hypothesis strategies for distributions: integer weights, so that zeros and ties appear, and examples shrink."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


def distributions(vocab_size: int = 4, largest: int = 4) -> st.SearchStrategy[Tensor]:
    """float64 [vocab_size], integer weights over their sum."""
    weights = st.lists(st.integers(0, largest), min_size=vocab_size, max_size=vocab_size).filter(any)
    return weights.map(lambda w: torch.tensor(w, dtype=torch.float64) / sum(w))


def distribution_rows(num_rows: int, vocab_size: int = 4) -> st.SearchStrategy[Tensor]:
    """float64 [num_rows, vocab_size]."""
    return st.lists(distributions(vocab_size), min_size=num_rows, max_size=num_rows).map(torch.stack)
