"""Synthetic acceptance rates, to time models without their weights. The output does NOT follow the target's
distribution.

Like vLLM's `rejection_sample_method="synthetic"`: a draft token is accepted with a given probability, whatever it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from specdec.sampling.distributions import Distribution
from specdec.verification import Draft, Verification


@dataclass(frozen=True, slots=True)
class SyntheticAcceptance:
    """A verification rule that accepts at given rates.

    rates: unconditional acceptance rate of each draft position, as `acceptance_rate_at` counts it: in [0, 1], never
    increasing. Positions after the last are never accepted.
    Raises ValueError for other rates.
    """

    rates: tuple[float, ...]
    needs_noise = False
    always_draws = True

    @classmethod
    def of(cls, rates: Any) -> SyntheticAcceptance:
        """The rule for an argument of any type."""
        values: list[Any] = list(rates) if isinstance(rates, Iterable) else [None]
        if not all(isinstance(rate, Real) for rate in values):
            raise ValueError(
                f"synthetic_acceptance_rates={rates!r} must be a list of probabilities, such as [0.8, 0.6]"
            )
        return cls(tuple(map(float, values)))

    def __post_init__(self) -> None:
        bounds = (1.0, *self.rates)
        if not self.rates or any(not 0 <= rate <= before for before, rate in zip(bounds, self.rates, strict=False)):
            raise ValueError(
                f"synthetic_acceptance_rates={list(self.rates)} must be probabilities that never increase, such as "
                "[0.8, 0.6]"
            )

    def __call__(
        self, target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
    ) -> Verification:
        """Same arguments as `verify_tokens`."""
        num_drafted, device = draft.tokens.shape[1], draft.tokens.device
        conditional = _conditional(self.rates, num_drafted, device)
        proposed = torch.arange(num_drafted, device=device) < draft.num_proposed.unsqueeze(1)
        accepted = ((accept_uniforms < conditional) & proposed).long().cumprod(1).sum(1)
        uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
        return Verification(accepted, target.at(accepted).draw(uniform))


@cache
def _conditional(rates: tuple[float, ...], num_drafted: int, device: torch.device) -> Tensor:
    """Acceptance rate of each position given that the previous one was accepted, float64 [num_drafted]."""
    padded = torch.tensor([1.0, *rates, *[0.0] * num_drafted], dtype=torch.float64, device=device)
    return (padded[1:] / padded[:-1].clamp(min=torch.finfo(torch.float64).tiny))[:num_drafted]
