"""Effect size of planted bugs: the exact distribution of the first token of a step with the bug in place.

This covers bugs that depend only on a token's own two distributions; those that mix rows, steps or caches have no such
formula. All functions take target_probs and draft_probs, float64 [n, vocab], and return the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from specdec.sampling.distributions import Dense
from specdec.verification import residual

BrokenDistribution = Callable[[Tensor, Tensor], Tensor]


def total_variation(probs: Tensor, other_probs: Tensor) -> Tensor:
    """Half the sum of absolute differences: float [..., vocab] twice -> float64 [...]."""
    return (probs.double() - other_probs.double()).abs().sum(-1) / 2


def greedy_draft_declared_sampled(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M1: the draft token is the draft's argmax but verified as if it had been sampled."""
    token = draft_probs.argmax(-1, keepdim=True)
    accepted = (target_probs.gather(-1, token) / draft_probs.gather(-1, token)).clamp(max=1)
    one_hot = torch.zeros_like(target_probs).scatter_(-1, token, 1.0)
    return accepted * one_hot + (1 - accepted) * _residual(target_probs, draft_probs)


def recovered_from_target(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M2."""
    kept = torch.minimum(target_probs, draft_probs)
    return kept + (1 - kept.sum(-1, keepdim=True)) * target_probs


def accepted_always(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M3: the draft's own distribution."""
    return draft_probs


def accept_uniform_reused(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M4: the rejecting uniform, which is at least target/draft, is reused to sample from the residual."""
    kept, ratios = torch.minimum(target_probs, draft_probs), _ratios(target_probs, draft_probs)
    edges = _residual(target_probs, draft_probs).cumsum(-1).clamp(max=1)
    ratios, order = ratios.sort(-1)
    draft = draft_probs.gather(-1, order)
    # the density of rejecting uniforms at u is the draft probability of ratios below u; integrate it up to u:
    counts = torch.searchsorted(ratios, edges.contiguous())
    mass, moment = (_from_zero(each.cumsum(-1)).gather(-1, counts) for each in (draft, draft * ratios))
    integral = edges * mass - moment
    return kept + integral.diff(dim=-1, prepend=torch.zeros_like(integral[..., :1]))


def draft_stream_shared(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M4: the uniform that sampled the draft token is reused to accept it: it lies in the token's interval."""
    high = draft_probs.cumsum(-1)
    accepted = torch.minimum(high, _ratios(target_probs, draft_probs)) - (high - draft_probs)
    accepted = accepted.clamp(min=0)
    return accepted + (1 - accepted.sum(-1, keepdim=True)) * _residual(target_probs, draft_probs)


def argmax_recovered(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M6."""
    kept = torch.minimum(target_probs, draft_probs)
    recovered = one_hot(_residual(target_probs, draft_probs).argmax(-1), target_probs.shape[-1])
    return kept + (1 - kept.sum(-1, keepdim=True)) * recovered


BROKEN_DISTRIBUTIONS: dict[str, BrokenDistribution] = {  # by the names of `mutants.MUTANTS`
    "M1 greedy draft declared as sampled": greedy_draft_declared_sampled,
    "M2 recover from the target": recovered_from_target,
    "M3 accept always": accepted_always,
    "M4 accept uniform reused": accept_uniform_reused,
    "M4 draft stream shared": draft_stream_shared,
    "M5 accept at equality": lambda target_probs, draft_probs: target_probs,
    "M6 argmax for a draw": argmax_recovered,
}


def _residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    return residual(target_probs, Dense(draft_probs))


def _ratios(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """target/draft, at most 1; 1 where the draft probability is 0."""
    impossible = draft_probs == 0
    return torch.where(impossible, 1.0, target_probs / draft_probs.masked_fill(impossible, 1.0)).clamp(max=1)


def _from_zero(sums: Tensor) -> Tensor:
    return torch.nn.functional.pad(sums, (1, 0))
