"""The real model, loaded once for all tests that need it."""

from collections.abc import Iterator

import pytest
import torch

from specdec.models.causal import CausalLM
from specdec.models.loading import load_pretrained

ALL_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread for toys, whose operations are too small to share; all of them for the real model."""
    torch.set_num_threads(ALL_THREADS if "default_model" in request.fixturenames else 1)
    yield
    torch.set_num_threads(ALL_THREADS)


@pytest.fixture(scope="session")
def default_model() -> CausalLM:
    """The default pair's target in float32, where equal means equal."""
    return CausalLM(*load_pretrained("smollm2-135m", dtype=torch.float32))
