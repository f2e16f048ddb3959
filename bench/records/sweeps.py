"""The axes of the cost sweep and the sizes measured on each."""

from __future__ import annotations

from bench.records import phases

CONTEXT = 256  # tokens of a sequence in sweeps that do not vary the context
WIDTH = 5  # tokens of a step that verifies four
SWEEPS = {
    "width": (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24, 32, 48, 64),
    "context": (128, 256, 512, 1024, 2048, 4096, 8192),
    "context-of-5": (128, 256, 512, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16, 32),
    "batch-of-5": (1, 2, 4, 8, 16, 32),
    "head": (1, 2, 4, 8, 16, 32),
    "tree": (1, 2, 3, 4, 6, 8, 11, 12, 16, 24, 32, 48, 64),
    "vocabulary": (8192, 16384, 32768, 49152, 131072, 262144),
    "ngram": (1000, 3000, 10_000, 30_000, 100_000),
    "suffix": (1000, 3000, 10_000, 30_000, 100_000),
    "slots": (1, 2, 4, 8, 16),
    **phases.SWEEPS,
}
NUM_REQUESTS, REQUEST_TOKENS = 32, 128  # of the sweep over slots, and tokens that each emits
SMOKE_SWEEPS = dict.fromkeys(SWEEPS, (16,))
