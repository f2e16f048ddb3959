"""Speculative decoding verification: accept, recover, bonus.

A cheap *draft model* proposes k tokens, each sampled from its own distribution. One forward pass of the *target model*
scores all of them, and verification decides how many to keep. The output is distributed exactly as if the target had
generated every token itself: speculative decoding is lossless, whatever the draft proposes.

Glossary:
    target distribution: the target model's next-token distribution; its rows are `target_probs`.
    draft distribution: the distribution a draft token was sampled from; its rows are `draft_probs`. A deterministic
        proposer (n-gram, suffix, greedy draft) has a one-hot draft distribution.
    k: the number of tokens proposed, `num_speculative_tokens` or gamma elsewhere. With k = 0 a step is plain
        autoregressive decoding.
    accepted token: a draft token that passes verification and is emitted.
    recovered token: the token emitted in place of the first rejected draft token, sampled from the residual
        distribution norm(max(target_probs - draft_probs, 0)).
    bonus token: the token emitted after all k draft tokens have been accepted, sampled from the target distribution.
    residual distribution: what is left of the target distribution once the draft has had its chance.

The rule, from left to right over the draft tokens x_0 ... x_{k-1}:
    1. Accept x_i with probability min(1, target_probs[x_i] / draft_probs[x_i]).
    2. At the first rejection, emit a recovered token and stop.
    3. If nothing was rejected, emit a bonus token.

Why it is lossless. Let p and q be the target and draft distributions at one position. The emitted token is x with
probability

    P(x) = q(x) min(1, p(x)/q(x))  +  (1 - sum_y min(p(y), q(y))) * max(p(x) - q(x), 0) / sum_y max(p(y) - q(y), 0)
         = min(p(x), q(x))         +  max(p(x) - q(x), 0)              because 1 - sum min(p, q) = sum max(p - q, 0)
         = p(x).

The proof needs one thing of the draft: that q is the distribution the token was really sampled from. A `Draft`
therefore carries its distribution with its tokens.

Three rules are implemented:
    `verify_tokens`: the rule above, token by token.
    `verify_block`: verifies the draft as a whole and accepts at least as many tokens in expectation.
    `verify_coupled`: target and draft sample with shared noise, so the output depends only on the seed, never on the
        draft.

All of them are pure functions of distributions and uniforms. No model and no random generator is involved, so the
tests prove them by enumeration.

References:
    Leviathan, Kalman and Matias 2023, arXiv:2211.17192 (writes p for the target, q for the draft).
    Chen et al. 2023, arXiv:2302.01318 (writes q for the target, p for the draft).
    Sun et al. 2024, arXiv:2403.10444 (block verification).
    Daliri, Musco and Suresh 2024, arXiv:2408.07978 (coupled verification).
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
    """Draft tokens together with the distributions they were sampled from.

    Args:
        tokens: int64 [batch, k].
        num_proposed: int64 [batch], the number of tokens proposed in each row, 0 <= num_proposed <= k. The rest is
            padding.
        distribution: the draft distributions, [batch, k].
        tree: the shape of a draft tree. The distribution then has one row per family of siblings, which were sampled
            from it without replacement. None for a chain.
        finite: bool, one per distribution, whether its logits were valid; None if they surely were.

    Raises:
        ValueError: if the shapes do not match.
    """

    tokens: Tensor
    num_proposed: Tensor
    distribution: Distribution
    tree: Tree | None = None
    finite: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.num_proposed.shape != self.tokens.shape[:1]:
            raise ValueError(
                f"tokens of shape {tuple(self.tokens.shape)} and num_proposed of shape "
                f"{tuple(self.num_proposed.shape)} must have shapes [batch, k] and [batch]"
            )
        num_rows, num_tokens = self.tokens.shape
        if self.tree is not None and len(self.tree) != num_tokens:
            raise ValueError(f"tree of {len(self.tree)} nodes must have one node per token, {num_tokens}")
        num_distributions = num_tokens if self.tree is None else len(self.tree.families)
        if self.distribution.shape != (num_rows, num_distributions):
            unit = "token" if self.tree is None else "family of siblings"
            raise ValueError(
                f"distribution of shape {tuple(self.distribution.shape)} must have shape "
                f"{(num_rows, num_distributions)}, one row per {unit}"
            )
        if self.finite is not None and self.finite.shape != self.distribution.shape:
            raise ValueError(f"finite of shape {tuple(self.finite.shape)} must have the distribution's shape")

    @classmethod
    def deterministic(cls, tokens: Tensor, num_proposed: Tensor, vocab_size: int) -> Draft:
        """A draft proposed with certainty: its distribution is one-hot."""
        return cls(tokens, num_proposed, OneHot(tokens, vocab_size))

    @classmethod
    def empty(cls, batch_size: int, vocab_size: int, device: torch.device) -> Draft:
        """A draft of no tokens; verifying it is one step of autoregressive decoding."""
        nothing = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        return cls.deterministic(nothing, nothing.new_zeros(batch_size), vocab_size)


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome of a step: row b emits its first accepted[b] draft tokens, then next_token[b].

    Attributes:
        accepted: int64 [batch], the number of accepted tokens, 0 <= accepted <= num_proposed.
        next_token: int64 [batch], the recovered token where accepted < num_proposed, the bonus token where equal.
        path: int64 [batch, levels] for a tree: the indices in the draft of the accepted tokens, padded with each
            level's own number. None for a chain, whose path is 0, 1, ...
    """

    accepted: Tensor
    next_token: Tensor
    path: Tensor | None = None


class VerificationRule(Protocol):
    """A verification rule, such as `verify_tokens`."""

    @property
    def needs_noise(self) -> bool:
        """Whether final_uniforms are [batch, k + 1, vocab], one uniform per token of the vocabulary.

        They depend on seed and position only, and drafts are sampled with the same ones.
        """
        ...

    @property
    def always_draws(self) -> bool:
        """Whether uniforms are needed even if every distribution is one-hot."""
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
    """Verify a draft token by token: the standard rejection sampler.

    Args:
        target: the target distributions, [batch, k + 1]; row i verifies draft token i, row k gives the bonus token.
        draft: k draft tokens per row with the distributions they were sampled from.
        accept_uniforms: float64 [batch, k] in [0, 1), one per accept test.
        final_uniforms: float64 [batch, k + 1] in [0, 1); column i samples the recovered or bonus token after i
            accepted ones.

    Returns:
        The number of accepted tokens and the recovered or bonus token of each row.

    Source: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.
    """
    num_drafted = draft.tokens.shape[1]
    if num_drafted == 0:
        return draw_final(target, draft, draft.num_proposed, final_uniforms)
    accepted = fused.num_accepted(target, draft.distribution, draft.tokens, draft.num_proposed, accept_uniforms)
    if accepted is not None:  # on GPUs: the lines below as one kernel
        return draw_final(target, draft, accepted, final_uniforms)
    target_prob, draft_prob = target[:, :num_drafted].prob(draft.tokens), draft.distribution.prob(draft.tokens)
    # u < target/draft without the division; strict <: at u = 0 an impossible token must lose
    passed = accept_uniforms * draft_prob < target_prob
    proposed = torch.arange(num_drafted, device=passed.device) < draft.num_proposed.unsqueeze(1)
    accepted = (passed & proposed).long().cumprod(1).sum(1)
    return draw_final(target, draft, accepted, final_uniforms)


@Rule
def verify_block(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Verify a draft as a block: accept up to the last position that passes, even if an earlier one did not.

    It accepts at least as many tokens in expectation as `verify_tokens`, and the output distribution is the same.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row with the distributions they were sampled from.
        accept_uniforms: float64 [batch, k] in [0, 1), one per accept test.
        final_uniforms: float64 [batch, k + 1] in [0, 1); column i samples the recovered or bonus token after i
            accepted ones.

    Returns:
        The number of accepted tokens and the recovered or bonus token of each row.

    Source: Sun et al. 2024, Algorithm 2.
    """
    if isinstance(target, OneHot):
        return verify_tokens(target, draft, accept_uniforms, final_uniforms)  # greedy: the same prefix either way
    weights = block_weights(target, draft)
    position = torch.arange(1, draft.tokens.shape[1] + 1, device=draft.tokens.device)
    passed = accept_uniforms < block_acceptance(target, draft, weights)
    accepted = torch.where(passed & (position <= draft.num_proposed.unsqueeze(1)), position, 0)
    accepted = torch.cat([torch.zeros_like(draft.num_proposed).unsqueeze(1), accepted], 1).amax(1)
    return draw_final(target, draft, accepted, final_uniforms, weights.gather(1, accepted.unsqueeze(1)))


@partial(Rule, needs_noise=True)
def verify_coupled(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Verify a draft by comparison: the target samples its own token at each position, and matching drafts are kept.

    The output is what the target samples with this noise, so it does not depend on the draft at all. A draft token
    sampled with the same noise mostly matches if the two distributions are close; a deterministic one is accepted as
    often as by `verify_tokens`.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row.
        accept_uniforms: ignored; present because all rules share one signature.
        final_uniforms: float64 [batch, k + 1, vocab] in [0, 1), the noise of each position.

    Returns:
        The number of accepted tokens and the recovered or bonus token of each row.

    Source: Daliri, Musco and Suresh 2024.
    """
    num_drafted = draft.tokens.shape[1]
    drawn = target.draw(final_uniforms)
    proposed = torch.arange(num_drafted, device=drawn.device) < draft.num_proposed.unsqueeze(1)
    accepted = ((drawn[:, :num_drafted] == draft.tokens) & proposed).long().cumprod(1).sum(1)
    return Verification(accepted, drawn.gather(1, accepted.unsqueeze(1)).squeeze(1))


def block_weights(target: Distribution, draft: Draft) -> Tensor:
    """Block weights: how likely the first i draft tokens are to be kept if the draft ended there, for i = 0 ... k.

    weight[0] = 1 and weight[i] = min(1, weight[i - 1] * target_probs[x] / draft_probs[x]) for the i-th draft token x.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row with the distributions they were sampled from.

    Returns:
        float64 [batch, k + 1].
    """
    num_drafted = draft.tokens.shape[1]
    target_prob, draft_prob = target[:, :num_drafted].prob(draft.tokens), draft.distribution.prob(draft.tokens)
    ratio = target_prob / draft_prob.clamp(min=torch.finfo(torch.float64).tiny)
    weights = [torch.ones_like(draft.num_proposed, dtype=torch.float64)]
    for i in range(num_drafted):
        weights.append((weights[-1] * ratio[:, i]).clamp(max=1.0))
    return torch.stack(weights, 1)


def block_acceptance(target: Distribution, draft: Draft, weights: Tensor) -> Tensor:
    """Probability that position i passes the block test, for i = 1 ... k.

    The last proposed position passes with its weight. An earlier one passes with excess / (excess + 1 - weight),
    where excess is the sum of max(weight * target_probs - draft_probs, 0) at the following position.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row with the distributions they were sampled from.
        weights: float64 [batch, k + 1], see `block_weights`.

    Returns:
        float64 [batch, k].
    """
    num_drafted = draft.tokens.shape[1]
    inner, scale = weights[:, 1:num_drafted], weights[:, 1:num_drafted, None]
    excess = row_sums(draft.distribution[:, 1:].excess(scale * target[:, 1:num_drafted].dense())).squeeze(-1)
    # 0/0 means weight 1 followed by equal distributions: the next position then passes with probability 1 as well
    passes = (excess / (excess + 1 - inner)).nan_to_num(1.0)
    is_last = torch.arange(1, num_drafted + 1, device=weights.device) == draft.num_proposed.unsqueeze(1)
    return torch.where(is_last, weights[:, 1:], torch.nn.functional.pad(passes, (0, num_drafted - passes.shape[1])))


def draw_final(
    target: Distribution, draft: Draft, accepted: Tensor, final_uniforms: Tensor, weight: Tensor | None = None
) -> Verification:
    """Sample the recovered or bonus token of each row.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row with the distributions they were sampled from.
        accepted: int64 [batch], the number of accepted tokens.
        final_uniforms: float64 [batch, k + 1] in [0, 1); column accepted[b] is used for row b.
        weight: see `residual`.

    Returns:
        The verification of these rows.
    """
    token = fused.final_token(target, draft.distribution, accepted, draft.num_proposed, final_uniforms, weight)
    if token is not None:  # on GPUs: the lines below as two kernels
        return Verification(accepted, token)
    uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
    return Verification(accepted, final_distribution(target, draft, accepted, weight).draw(uniform))


def final_distribution(
    target: Distribution, draft: Draft, accepted: Tensor, weight: Tensor | None = None
) -> Distribution:
    """Distribution of the recovered or bonus token: the residual after a rejection, else the target distribution.

    Args:
        target: the target distributions, [batch, k + 1].
        draft: k draft tokens per row with the distributions they were sampled from.
        accepted: int64 [batch], the number of accepted tokens.
        weight: see `residual`.

    Returns:
        Distributions of shape [batch].
    """
    target_distribution = target.at(accepted)
    if isinstance(target_distribution, OneHot) or draft.tokens.shape[1] == 0:
        return target_distribution  # the residual of a one-hot target is that target
    draft_distribution = draft.distribution.at(accepted.clamp(max=draft.tokens.shape[1] - 1))
    rejected = (accepted < draft.num_proposed).unsqueeze(1)
    target_probs = target_distribution.dense()
    return Dense(torch.where(rejected, residual(target_probs, draft_distribution, weight), target_probs))


def residual(target_probs: Tensor, draft_distribution: Distribution, weight: Tensor | None = None) -> Tensor:
    """Distribution of the recovered token: norm(max(weight * target_probs - draft_probs, 0)).

    Args:
        target_probs: float [..., vocab], rows summing to 1.
        draft_distribution: the draft distributions, shape [...].
        weight: float [..., 1], the block weight of the accepted tokens; None stands for 1.

    Returns:
        float [..., vocab], rows summing to 1. Where the residual is zero everywhere the target row is returned; a
        rejection there has probability 0.

    Raises:
        ValueError: if the shapes differ.

    Source: Leviathan et al. 2023, p' in Algorithm 1; (q - p)+ in Chen et al. 2023.
    """
    if target_probs.shape != (*draft_distribution.shape, draft_distribution.vocab_size):
        raise ValueError(
            f"target_probs of shape {tuple(target_probs.shape)} must have the shape of the draft distributions, "
            f"{(*draft_distribution.shape, draft_distribution.vocab_size)}"
        )
    excess = draft_distribution.excess(target_probs if weight is None else weight * target_probs)
    mass = row_sums(excess)
    return torch.where(mass > 0, excess / mass, target_probs)
