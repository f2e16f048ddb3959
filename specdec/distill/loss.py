"""The distillation loss of all drafts, computed without storing the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

HARD = 0.25  # weight of the hard-label term relative to the soft-label term
CHUNK = 512  # positions whose logits are in memory at once


def distillation_loss(
    hidden: Tensor, weight: Tensor, features: Tensor, target_weight: Tensor, place_weights: Sequence[float]
) -> Tensor:
    """Mean cross-entropy against the target's distributions plus HARD times that against the target's argmax.

    The distributions are restricted to the given tokens; matching the target on every subset is matching it.

    Args:
        hidden: float [places, positions, width]; for each place in a draft, the states that give its logits.
        weight: float [tokens, width], the draft's output matrix.
        features: float [positions, hidden], the target's states; no gradient.
        target_weight: float [tokens, hidden], the target's output matrix; no gradient.
        place_weights: weight of each place in the sum.
    """
    loss: Tensor = _FusedLoss.apply(hidden, weight, features, target_weight, tuple(place_weights))
    return loss


class _FusedLoss(torch.autograd.Function):
    """Computes gradients with the loss, chunk by chunk: the logits of a whole batch would take gigabytes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        features: Tensor,
        target_weight: Tensor,
        place_weights: Sequence[float],
    ) -> Tensor:
        dtype, num_positions = torch.bfloat16, hidden.shape[1]
        hidden, narrow, target_narrow = hidden.to(dtype), weight.to(dtype), target_weight.to(dtype)
        total = torch.zeros((), device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, num_positions, CHUNK):
            chunk = slice(start, start + CHUNK)
            goal = (features[chunk].to(dtype) @ target_narrow.T).float().softmax(-1)
            best = goal.argmax(-1, keepdim=True)
            goal.scatter_add_(1, best, torch.full_like(best, HARD, dtype=goal.dtype))
            for place, place_weight in enumerate(place_weights):
                states = hidden[place, chunk]
                log_probs = (states @ narrow.T).float().log_softmax(-1)
                scale = place_weight / num_positions
                total -= scale * torch.dot(goal.flatten(), log_probs.flatten())
                slope = log_probs.exp_().mul_(1 + HARD).sub_(goal).mul_(scale).to(dtype)
                hidden_grad[place, chunk] = slope @ narrow
                if weight_grad is not None:
                    weight_grad += slope.T @ states
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0], None if weight_grad is None else weight_grad * grads[0], None, None, None
