"""Measured seconds of a step of target and draft, by width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from specdec.models.base import LanguageModel, prefill, score
from specdec.runtime.recording import Recorder
from specdec.runtime.timing import durations_s

MAX_DRAFT_LENGTH = 8  # tokens drafted in a step at the most


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds. target_s: of a target step by its width, from one token up. draft_s: of drawing one draft token.

    start_s: of drawing a draft, however short: what was emitted since the last one must be read first.
    """

    target_s: tuple[float, ...]
    draft_s: float
    start_s: float = 0.0

    def verified_s(self, num_drafted: int) -> float:
        """A target step that verifies that many draft tokens."""
        return self.target_s[min(num_drafted, len(self.target_s) - 1)]

    def step_s(self, num_drafted: int) -> float:
        """A step that draws that many draft tokens and verifies them."""
        return self.verified_s(num_drafted) + (self.start_s + num_drafted * self.draft_s if num_drafted else 0.0)


def target_costs(
    target: LanguageModel,
    rows: int,
    records: bool | None = None,
    widths: Sequence[int] = range(1, MAX_DRAFT_LENGTH + 2),
) -> tuple[float, ...]:
    """Seconds of a target step of so many tokens in each of so many rows, for each width the least of a few.

    records: as for `Recorder`.
    """
    context = max(1, min(64, target.context_length - max(widths)))
    recorder = Recorder(target.device, records)
    cache = target.allocate(rows, recorder.capacity(context + max(widths)))
    tokens = torch.zeros(rows, max(widths), dtype=torch.int64, device=target.device)
    for row in range(rows):
        prefill(target, [0] * context, cache, row)

    def step(width: int) -> None:
        cache.num_cached[:] = [context] * rows
        score(target, tokens[:, :width], cache, recorder)

    return tuple(min(durations_s(partial(step, width), target.device, repeats=5, warm_up=3)) for width in widths)
