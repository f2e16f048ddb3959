"""Effect size of planted bugs: the exact distribution of the first token of a step with the bug in place.

This covers bugs that depend only on a token's own two distributions; those that mix rows, steps or caches have no such
formula. All functions take target_probs and draft_probs, float64 [n, vocab], and return the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from specdec.conformance.mutants.proposals import PeekingLength, drawn_by_bfloat16_sums
from specdec.sampling.distributions import Dense
from specdec.verification import residual

BrokenDistribution = Callable[[Tensor, Tensor], Tensor]


def total_variation(probs: Tensor, other_probs: Tensor) -> Tensor:
    """Half the sum of absolute differences: float [..., vocab] twice -> float64 [...]."""
    return (probs.double() - other_probs.double()).abs().sum(-1) / 2


def greedy_draft_declared_sampled(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M1: the draft token is the draft's argmax but verified as if it had been sampled."""
    return drawn_from_another(target_probs, draft_probs, one_hot(draft_probs.argmax(-1), draft_probs.shape[-1]))


def drawn_from_another(target_probs: Tensor, draft_probs: Tensor, drawn_probs: Tensor) -> Tensor:
    """The draft token is drawn from drawn_probs but verified as if it had been drawn from draft_probs."""
    kept = drawn_probs * _ratios(target_probs, draft_probs)
    return kept + (1 - kept.sum(-1, keepdim=True)) * _residual(target_probs, draft_probs)


def drawn_in_low_precision(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M15."""
    return drawn_from_another(target_probs, draft_probs, drawn_by_bfloat16_sums(draft_probs))


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


def proposal_noise_reused(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M14: the recovered token is drawn by an exponential race with the noise by which the draft token won its own.

    Let E_v be the independent waiting times of rate 1, so that the draft token has the smallest E_v / draft_v, which is
    T. It is not in the support of the residual r. The residual's waiting times are E_v / r_v, and all that the draft's
    race says of them is E_v > draft_v T: a token enters the residual's race at time c_v T, with c_v = draft_v / r_v, at
    its usual rate r_v. T is exponential with rate 1, whatever token won, and integrating over it leaves
    P(v) = r_v * integral from c_v of 1 / (1 + H(s))^2, where H(s) is the sum of r_w max(s - c_w, 0). H is piecewise
    linear, so that the integral is a sum.
    """
    kept, residual_probs = torch.minimum(target_probs, draft_probs), _residual(target_probs, draft_probs)
    never = torch.finfo(torch.float64).max
    entries = torch.where(residual_probs > 0, draft_probs / residual_probs, torch.inf)
    entries, order = entries.sort(-1)
    rates = residual_probs.gather(-1, order)
    slopes = rates.cumsum(-1)
    lengths = entries.clamp(max=never).diff(dim=-1, append=torch.full_like(entries[..., :1], never))
    risen = _from_zero((slopes * lengths).cumsum(-1))
    pieces = (1 / (1 + risen[..., :-1]) - 1 / (1 + risen[..., 1:])) / slopes.clamp(min=torch.finfo(torch.float64).tiny)
    after = pieces.flip(-1).cumsum(-1).flip(-1)
    won = torch.zeros_like(rates).scatter_(-1, order, rates * after)
    return kept + (1 - kept.sum(-1, keepdim=True)) * won


def length_peeked(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """M20: a draft token below the threshold is not verified, and the target draws another in its place."""
    verified = torch.where(draft_probs >= PeekingLength.threshold, draft_probs, 0.0)
    kept = torch.minimum(target_probs, verified)
    rejected = (verified - kept).sum(-1, keepdim=True)
    dropped = 1 - verified.sum(-1, keepdim=True)
    return kept + rejected * _residual(target_probs, draft_probs) + dropped * target_probs


BROKEN_DISTRIBUTIONS: dict[str, BrokenDistribution] = {  # by the names of `mutants.MUTANTS`
    "M1 greedy draft declared as sampled": greedy_draft_declared_sampled,
    "M2 recover from the target": recovered_from_target,
    "M3 accept always": accepted_always,
    "M4 accept uniform reused": accept_uniform_reused,
    "M4 draft stream shared": draft_stream_shared,
    "M5 accept at equality": lambda target_probs, draft_probs: target_probs,
    "M6 argmax for a draw": argmax_recovered,
    "M14 proposal noise reused": proposal_noise_reused,
    "M15 draft drawn in low precision": drawn_in_low_precision,
    "M20 draft length peeks": length_peeked,
}


def _residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    return residual(target_probs, Dense(draft_probs))


def _ratios(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """target/draft, at most 1; 1 where the draft probability is 0."""
    impossible = draft_probs == 0
    return torch.where(impossible, 1.0, target_probs / draft_probs.masked_fill(impossible, 1.0)).clamp(max=1)


def _from_zero(sums: Tensor) -> Tensor:
    return torch.nn.functional.pad(sums, (1, 0))
