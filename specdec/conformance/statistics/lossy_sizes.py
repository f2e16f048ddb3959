"""What lossy verification does to the distribution of a step's first token, exactly.

As for planted bugs (`sizes`), this covers rules whose decision depends on the token's own two distributions only, so
not FLy. All functions take target_probs and draft_probs, float64 [n, vocab], and return the same shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.lossy import Threshold, TopK, Typical


def first_token(rule: Any, target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """The distribution of the first token that a step emits under a rule. Raises TypeError for other rules."""
    if isinstance(rule, Threshold):
        return _by_thresholds(rule, target_probs, draft_probs)
    if not isinstance(rule, Typical | TopK):
        raise TypeError(f"rule={rule} must decide by a token's own distributions; measure it by an audit")
    allowed = _typical(rule, target_probs) if isinstance(rule, Typical) else _relaxed(rule, target_probs)
    kept = draft_probs * allowed
    return kept + (1 - kept.sum(-1, keepdim=True)) * target_probs


def kl_divergence(probs: Tensor, target_probs: Tensor) -> Tensor:
    """Of probs from target_probs, in nats: float64 [n, vocab] twice -> [n]; inf outside the target's support."""
    divergence: Tensor = (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, target_probs)).sum(-1)
    return divergence


def _typical(rule: Typical, target_probs: Tensor) -> Tensor:
    likely: Tensor = rule.delta * torch.special.entr(target_probs).sum(-1, keepdim=True).neg().exp()
    return target_probs > likely.clamp(max=rule.epsilon)


def _relaxed(rule: TopK, target_probs: Tensor) -> Tensor:
    ranked = target_probs.sort(-1, descending=True).values
    is_near = target_probs >= ranked[..., :1] * torch.tensor(-rule.delta).double().exp()
    return is_near & (target_probs >= ranked[..., min(rule.k, ranked.shape[-1]) - 1, None]) & (target_probs > 0)


def _by_thresholds(rule: Threshold, target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    acceptance = torch.where(target_probs >= rule.single, 1.0, (target_probs / rule.acc).clamp(max=1))
    rejected = draft_probs * (1 - acceptance)
    # a rejected token y is replaced by a draw from the target without y
    scale = torch.where(rejected > 0, rejected / (1 - target_probs).clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return draft_probs * acceptance + target_probs * (scale.sum(-1, keepdim=True) - scale)
