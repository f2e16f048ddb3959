"""Measured step times of target and draft, by width.

Each width is measured by itself, with tokens of a text: more tokens of a mixture of experts read more experts, while
one token repeated is always routed to the same few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch

from specdec.models.base import LanguageModel, prefill, score
from specdec.models.vocabularies import SAMPLE
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
    text = sample_tokens(target, rows, context + max(widths))
    recorder = Recorder(target.device, records)
    cache = target.allocate(rows, recorder.capacity(context + max(widths)), max_rollback=max(widths))
    tokens = torch.tensor(text, device=target.device)[:, context:]
    for row in range(rows):
        prefill(target, text[row][:context], cache, row)

    def step(width: int) -> None:
        cache.num_cached[:] = [context] * rows
        score(target, tokens[:, :width], cache, recorder)

    return tuple(min(durations_s(partial(step, width), target.device, repeats=5, warm_up=3)) for width in widths)


def sample_tokens(target: LanguageModel, rows: int, width: int) -> list[list[int]]:
    """Different tokens for each row: a sample text over and over, or random ones for a target without a tokenizer."""
    if target.tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        drawn: list[list[int]] = torch.randint(target.vocab_size, (rows, width), generator=generator).tolist()
        return drawn
    text = cycle(target.tokenizer(SAMPLE, add_special_tokens=False).input_ids)
    return [[*islice(text, width)] for _ in range(rows)]
