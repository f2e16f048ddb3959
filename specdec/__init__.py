"""Speculative decoding that provably says what the target model would have said."""

from specdec.engine import METHODS, Engine
from specdec.requests import Chunk, Completion, Step
from specdec.sampling import SamplingParams
from specdec.stats import AcceptanceCounts, PhaseTimes

__all__ = ["METHODS", "AcceptanceCounts", "Chunk", "Completion", "Engine", "PhaseTimes", "SamplingParams", "Step"]
__version__ = "0.1.0"
