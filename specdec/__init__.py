"""Speculative decoding with a provably unchanged output distribution.

Names are imported on first use, so that the command line can check its arguments without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.engine import Engine, EngineBusyError
    from specdec.methods import METHODS
    from specdec.models.causal import CausalLM
    from specdec.models.seq2seq import Seq2SeqLM
    from specdec.requests import Chunk, Completion, Step
    from specdec.sampling_params import SamplingParams
    from specdec.stats import AcceptanceCounts, PhaseTimes

__all__ = [
    "METHODS",
    "AcceptanceCounts",
    "CausalLM",
    "Chunk",
    "Completion",
    "Engine",
    "EngineBusyError",
    "PhaseTimes",
    "SamplingParams",
    "Seq2SeqLM",
    "Step",
]
__version__ = "0.1.0"
_HOMES = {
    "METHODS": "methods",
    "AcceptanceCounts": "stats",
    "CausalLM": "models.causal",
    "Chunk": "requests",
    "Completion": "requests",
    "Engine": "engine",
    "EngineBusyError": "engine",
    "PhaseTimes": "stats",
    "SamplingParams": "sampling_params",
    "Seq2SeqLM": "models.seq2seq",
    "Step": "requests",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(f"specdec.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
