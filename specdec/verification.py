"""The rule that makes speculative decoding lossless.

A cheap *draft* proposes tokens x_0 ... x_{k-1}, each drawn from its own distribution `draft_probs`. One call of the
*target* gives its distributions `target_probs` at those k positions and at the one after. Going from left to right:

* **accept** x_i with probability min(1, target_probs[x_i] / draft_probs[x_i]);
* at the first rejection draw the **recovered** token from the residual distribution, norm(max(target_probs -
draft_probs, 0)),
  and stop;
* if nothing was rejected draw the **bonus** token from the target's distribution after the last draft.

That is `verify_tokens`. `verify_block` decides about the draft as a whole, and keeps more of it under the same
distribution. `verify_coupled` lets draft and target draw by the same noise, and keeps the draft while they draw the
same tokens.

Why the token kept at a position has exactly the target's distribution (p the target's, q the draft's probabilities):

    P(x) = q(x) min(1, p(x)/q(x))  +  (1 - sum_y min(p(y), q(y))) * max(p(x) - q(x), 0) / sum_y max(p(y) - q(y), 0)
         = min(p(x), q(x))         +  max(p(x) - q(x), 0)              because both sums are the same number
         = p(x).

This holds whatever the draft is, as long as q is the distribution that the draft was really drawn from; `Draft`
therefore carries its distribution. A deterministic proposer's distribution is one-hot. Plain autoregressive decoding
is the case k = 0.

Everything here is a function of distributions and uniforms: no model, no random generator, so it can be proved by
enumeration.

Sources: Leviathan, Kalman and Matias 2023 (arXiv:2211.17192), who write p for the target and q for the draft;
Chen et al. 2023 (arXiv:2302.01318), who write them the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from specdec.sampling import fused
from specdec.sampling.distributions import Dense, Distribution, OneHot, row_sums
from specdec.trees.shape import Tree


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens together with the distribution that they were drawn from.

    tokens: int64 [batch, k]. num_proposed: int64 [batch], 0 <= num_proposed <= k; a row's tokens after these are
    padding. distribution: the draft's distributions [batch, k].
    tree: its shape, if it is one. The distribution then has a row for each family of siblings, in their order, from
    which they were drawn without replacement. None: a chain, each token following the one before.
    finite: bool, as many as the distributions, whether they come from logits that have one; None if they surely do.
    Raises ValueError if the shapes do not belong together.
    """

    tokens: Tensor
    num_proposed: Tensor
    distribution: Distribution
    tree: Tree | None = None
    finite: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.num_proposed.shape != self.tokens.shape[:1]:
            raise ValueError(
                f"tokens of shape {tuple(self.tokens.shape)} must be [batch, k] and num_proposed, here of "
                f"shape {tuple(self.num_proposed.shape)}, [batch]"
            )
        num_rows, num_tokens = self.tokens.shape
        if self.tree is not None and len(self.tree) != num_tokens:
            raise ValueError(f"a tree of {len(self.tree)} nodes must have one for each of {num_tokens} tokens")
        num_distributions = num_tokens if self.tree is None else len(self.tree.families)
        if self.distribution.shape != (num_rows, num_distributions):
            whose = "tokens" if self.tree is None else "tokens' families"
            raise ValueError(
                f"distribution of shape {tuple(self.distribution.shape)} must have one row for each of the "
                f"{(num_rows, num_distributions)} {whose}"
            )
        if self.finite is not None and self.finite.shape != self.distribution.shape:
            raise ValueError(f"finite of shape {tuple(self.finite.shape)} must have the distribution's shape")

    @classmethod
    def deterministic(cls, tokens: Tensor, num_proposed: Tensor, vocab_size: int) -> Draft:
        """A draft that could not have been otherwise: its distribution is one-hot."""
        return cls(tokens, num_proposed, OneHot(tokens, vocab_size))

    @classmethod
    def empty(cls, batch_size: int, vocab_size: int, device: torch.device) -> Draft:
        """No proposal: verifying it is one step of autoregressive decoding."""
        nothing = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        return cls.deterministic(nothing, nothing.new_zeros(batch_size), vocab_size)


@dataclass(frozen=True, slots=True)
class Verification:
    """What became of a draft: row b emits its first accepted[b] draft tokens, then next_token[b].

    accepted: int64 [batch], 0 <= accepted <= the draft's num_proposed.
    next_token: int64 [batch]; recovered where accepted < num_proposed, bonus where they are equal.
    path: of a tree, int64 [batch, levels]: the tokens' places in the draft, where a chain's are 0, 1, ...; behind the
    accepted ones so, too.
    """

    accepted: Tensor
    next_token: Tensor
    path: Tensor | None = None


class VerificationRule(Protocol):
    """Decides about a draft; `verify_tokens` is one."""

    @property
    def needs_noise(self) -> bool:
        """Whether final_uniforms are [batch, k + 1, vocab], one for each token.

        They depend on seed and position only, and drafts are drawn by them, too.
        """
        ...

    @property
    def always_draws(self) -> bool:
        """Whether uniforms are needed even where every distribution is one-hot."""
        ...

    def __call__(
        self, target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
    ) -> Verification: ...


@dataclass(frozen=True, slots=True)
class Rule:
    """A function of distributions and uniforms as a VerificationRule; as a decorator it makes one."""

    verify: Callable[[Distribution, Draft, Tensor, Tensor], Verification]
    needs_noise: bool = False
    always_draws: bool = False

    def __call__(
        self, target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
    ) -> Verification:
        return self.verify(target, draft, accept_uniforms, final_uniforms)


@Rule
def verify_tokens(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Token-by-token verification (Leviathan et al., Algorithm 1; Chen et al., Algorithm 2).

    target: the target's distributions [batch, k + 1]; position i is the distribution of the token that draft token i
    proposes.
    accept_uniforms: float64 [batch, k], one for each test.
    final_uniforms: float64 [batch, k + 1]; column i draws the last token if i draft tokens were accepted.
    """
    num_drafted = draft.tokens.shape[1]
    if num_drafted == 0:
        return draw_last(target, draft, draft.num_proposed, final_uniforms)
    accepted = fused.num_accepted(target, draft.distribution, draft.tokens, draft.num_proposed, accept_uniforms)
    if accepted is not None:  # a kernel of what follows, on GPUs
        return draw_last(target, draft, accepted, final_uniforms)
    target_prob, draft_prob = target[:, :num_drafted].prob(draft.tokens), draft.distribution.prob(draft.tokens)
    # u < target/draft without the division; strict <: at u = 0 an impossible token must lose
    passed = accept_uniforms * draft_prob < target_prob
    proposed = torch.arange(num_drafted, device=passed.device) < draft.num_proposed.unsqueeze(1)
    accepted = (passed & proposed).long().cumprod(1).sum(1)
    return draw_last(target, draft, accepted, final_uniforms)


@Rule
def verify_block(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Block verification: the draft is kept up to the last position that passes, which may save a token before it.

    Arguments as for `verify_tokens`. In expectation it accepts at least as many tokens, under the same distribution.
    Source: Sun et al. 2024 (arXiv:2403.10444), Algorithm 2.
    """
    if isinstance(target, OneHot):
        return verify_tokens(target, draft, accept_uniforms, final_uniforms)  # nothing to save: a token fits or not
    weights = block_weights(target, draft)
    position = torch.arange(1, draft.tokens.shape[1] + 1, device=draft.tokens.device)
    passed = accept_uniforms < block_acceptance(target, draft, weights)
    accepted = torch.where(passed & (position <= draft.num_proposed.unsqueeze(1)), position, 0)
    accepted = torch.cat([torch.zeros_like(draft.num_proposed).unsqueeze(1), accepted], 1).amax(1)
    return draw_last(target, draft, accepted, final_uniforms, weights.gather(1, accepted.unsqueeze(1)))


@partial(Rule, needs_noise=True)
def verify_coupled(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Coupled verification: the target draws its own token at each position, and the draft is kept while it is that.

    final_uniforms: float64 [batch, k + 1, vocab], the noise of each position; other arguments as for `verify_tokens`,
    of which accept_uniforms decide nothing.
    What is emitted is what the target draws by this noise, whatever was drafted. A draft drawn by the same noise is
    mostly the same token, where the distributions are close; a deterministic one is kept as often as by
    `verify_tokens`.
    Source: Daliri, Musco and Suresh 2024 (arXiv:2408.07978).
    """
    num_drafted = draft.tokens.shape[1]
    drawn = target.draw(final_uniforms)
    proposed = torch.arange(num_drafted, device=drawn.device) < draft.num_proposed.unsqueeze(1)
    accepted = ((drawn[:, :num_drafted] == draft.tokens) & proposed).long().cumprod(1).sum(1)
    return Verification(accepted, drawn.gather(1, accepted.unsqueeze(1)).squeeze(1))


def block_weights(target: Distribution, draft: Draft) -> Tensor:
    """How much of the target's probability of i tokens their draft carries, i = 0 ... k: float64 [batch, k + 1].

    weight 0 is 1; weight i = min(1, weight (i - 1) * target / draft), the two being the probabilities of token i.
    """
    num_drafted = draft.tokens.shape[1]
    target_prob, draft_prob = target[:, :num_drafted].prob(draft.tokens), draft.distribution.prob(draft.tokens)
    ratio = target_prob / draft_prob.clamp(min=torch.finfo(torch.float64).tiny)
    weights = [torch.ones_like(draft.num_proposed, dtype=torch.float64)]
    for i in range(num_drafted):
        weights.append((weights[-1] * ratio[:, i]).clamp(max=1.0))
    return torch.stack(weights, 1)


def block_acceptance(target: Distribution, draft: Draft, weights: Tensor) -> Tensor:
    """Probability that position i passes, i = 1 ... k: float64 [batch, k].

    The last drafted position passes with its weight; one before it with excess / (excess + 1 - weight), where excess
    is the mass of max(weight * target - draft, 0) after it.
    """
    num_drafted = draft.tokens.shape[1]
    inner, scale = weights[:, 1:num_drafted], weights[:, 1:num_drafted, None]
    excess = row_sums(draft.distribution[:, 1:].excess(scale * target[:, 1:num_drafted].dense())).squeeze(-1)
    # 0/0: weight 1 and equal distributions after it; then the next position passes at least as surely, and decides
    passes = (excess / (excess + 1 - inner)).nan_to_num(1.0)
    is_last = torch.arange(1, num_drafted + 1, device=weights.device) == draft.num_proposed.unsqueeze(1)
    return torch.where(is_last, weights[:, 1:], torch.nn.functional.pad(passes, (0, num_drafted - passes.shape[1])))


def draw_last(
    target: Distribution, draft: Draft, accepted: Tensor, final_uniforms: Tensor, weight: Tensor | None = None
) -> Verification:
    """Draw the token after the accepted ones with its position's uniform; arguments as for `final_distribution`."""
    token = fused.last_token(target, draft.distribution, accepted, draft.num_proposed, final_uniforms, weight)
    if token is not None:  # two kernels of what follows, on GPUs
        return Verification(accepted, token)
    uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
    return Verification(accepted, final_distribution(target, draft, accepted, weight).draw(uniform))


def final_distribution(
    target: Distribution, draft: Draft, accepted: Tensor, weight: Tensor | None = None
) -> Distribution:
    """Distribution of the token after the accepted ones: the residual after a rejection, the target's after full
    acceptance.

    target: distributions [batch, k + 1]; accepted: int64 [batch]; weight: as for `residual`. Returns distributions
    [batch].
    """
    target_distribution = target.at(accepted)
    if isinstance(target_distribution, OneHot) or draft.tokens.shape[1] == 0:
        return target_distribution  # a one-hot target has no mass but on its token: that is its residual too
    draft_distribution = draft.distribution.at(accepted.clamp(max=draft.tokens.shape[1] - 1))
    rejected = (accepted < draft.num_proposed).unsqueeze(1)
    target_probs = target_distribution.dense()
    return Dense(torch.where(rejected, residual(target_probs, draft_distribution, weight), target_probs))


def residual(target_probs: Tensor, draft_distribution: Distribution, weight: Tensor | None = None) -> Tensor:
    """Distribution of the token that replaces a rejected draft: norm(max(weight * target - draft, 0)).

    target_probs: float [..., vocab], each row summing to 1. draft_distribution: distributions [...].
    weight: [..., 1], below 1 only where block verification ends a draft that carries less than the target has.
    Where nothing exceeds the target row is returned: a rejection then has probability 0.
    Raises ValueError if the shapes differ.
    Source: Leviathan et al. 2023, p' in Algorithm 1; Chen et al. 2023 write (q - p)+.
    """
    if target_probs.shape != (*draft_distribution.shape, draft_distribution.vocab_size):
        raise ValueError(
            f"target_probs of shape {tuple(target_probs.shape)} must have the shape of the draft's distributions, "
            f"{(*draft_distribution.shape, draft_distribution.vocab_size)}"
        )
    excess = draft_distribution.excess(target_probs if weight is None else weight * target_probs)
    mass = row_sums(excess)
    return torch.where(mass > 0, excess / mass, target_probs)
