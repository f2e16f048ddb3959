"""The real model, loaded once for all tests that need it."""

import pytest
import torch

from specdec.models.causal import CausalLM
from specdec.models.loading import load_pretrained


@pytest.fixture(scope="session")
def default_model() -> CausalLM:
    """The default pair's target in float32, where equal means equal."""
    return CausalLM(*load_pretrained("smollm2-135m", dtype=torch.float32))
