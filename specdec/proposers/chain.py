"""Drawing a draft token by token, each from its own law, given those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.adaptive import AdaptiveLength, confidence
from specdec.randomness import Role, UniformSource
from specdec.requests import Batch
from specdec.sampling import Law
from specdec.verification import Draft


def draw_chain(
    batch: Batch,
    limits: Sequence[int],
    logits_after: Callable[[Tensor], Tensor],
    uniforms: UniformSource,
    adaptive: AdaptiveLength | None = None,
    vocabulary: Tensor | None = None,
) -> Draft:
    """A draft of up to limits[r] tokens for row r, drawn with the rows' own sampling parameters.

    logits_after: tokens drafted so far, int64 [rows, i], with i growing by one from call to call -> logits of the
    next, [rows, 1, vocab]. adaptive: ends the draft where another token would not pay. vocabulary: int64, ascending,
    the tokens that the logits are of, or None for all.
    """
    device, lengths = batch.sampling.device, list(limits)
    draws = _draws(batch, max(limits), uniforms)
    drafted = torch.empty(len(batch.rows), 0, dtype=torch.int64, device=device)
    reach = [1.0] * len(lengths)
    steps: list[tuple[Tensor, Law]] = []
    for i in range(max(limits)):
        if adaptive:
            pays = adaptive.pays(reach, i)
            lengths = [length if more else min(length, i) for length, more in zip(lengths, pays, strict=True)]
            if max(lengths) <= i:
                break
        logits = logits_after(drafted)
        law = batch.sampling.law(logits, drafted, vocabulary)[:, 0]
        token = law.draw(draws[:, i])
        steps.append((token, law))
        drafted = torch.cat([drafted, token.unsqueeze(1)], 1)
        if adaptive:
            reach = [a * b for a, b in zip(reach, confidence(logits[:, 0]).tolist(), strict=True)]
    if not steps:
        return Draft.empty(len(batch.rows), batch.sampling.vocab_size, device)
    return Draft.sampled(steps, torch.tensor(lengths, device=device))


def _draws(batch: Batch, num_tokens: int, uniforms: UniformSource) -> Tensor:
    device = batch.sampling.device
    if batch.sampling.all_greedy:
        return torch.zeros(len(batch.rows), num_tokens, dtype=torch.float64, device=device)
    origins = torch.tensor(batch.lengths(), device=device).unsqueeze(1)
    positions = origins + torch.arange(num_tokens, device=device)
    roles = torch.full_like(positions, Role.DRAFT)
    return uniforms(batch.sampling.seeds.unsqueeze(1), positions, roles, origins)
