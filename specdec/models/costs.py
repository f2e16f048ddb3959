"""Measured step times of target and draft, by width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from specdec.models.base import LanguageModel, prefill, score
from specdec.runtime.recording import Recorder
from specdec.runtime.timing import durations_s

MAX_DRAFT_LENGTH = 8  # maximum tokens drafted per step


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Step times in seconds. target_s: a target step by width, from one token up. draft_s: one draft token.

    start_s: fixed cost of a draft, whose model must first process the tokens emitted since the last one.
    """

    target_s: tuple[float, ...]
    draft_s: float
    start_s: float = 0.0

    def verified_s(self, num_drafted: int) -> float:
        """Seconds of a target step that verifies num_drafted draft tokens."""
        return self.target_s[min(num_drafted, len(self.target_s) - 1)]

    def step_s(self, num_drafted: int) -> float:
        """Seconds of a step that drafts num_drafted tokens and verifies them."""
        return self.verified_s(num_drafted) + (self.start_s + num_drafted * self.draft_s if num_drafted else 0.0)


def target_costs(
    target: LanguageModel,
    rows: int,
    records: bool | None = None,
    widths: Sequence[int] = range(1, MAX_DRAFT_LENGTH + 2),
) -> tuple[float, ...]:
    """Seconds of a target step with `rows` rows, for each width the minimum of a few runs. records: see `Recorder`."""
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
