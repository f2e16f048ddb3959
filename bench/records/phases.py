"""The sweep over the phases of a decode step: its axes and the phases it reports."""

from __future__ import annotations

GAMMA = 4
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
METHODS = ("autoregressive", "ngram", "eagle", "hybrid")  # no draft, a copy, a drawn draft, and both
SWEEPS = {f"phases-{method}-{distribution}": (1, 8) for method in METHODS for distribution in TEMPERATURES}
PHASES = ("draft", "scoring", "verification", "bookkeeping")


def parse(axis: str) -> tuple[str, float]:
    """Method and temperature of an axis."""
    _, method, distribution = axis.split("-")
    return method, TEMPERATURES[distribution]
