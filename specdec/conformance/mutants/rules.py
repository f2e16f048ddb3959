"""Bugs of verification rules and of the uniforms that they read."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.sampling.distributions import Dense, Distribution
from specdec.sampling.randomness import Role, UniformSource
from specdec.verification import (
    Draft,
    Rule,
    Verification,
    block_weights,
    draw_final,
    final_distribution,
    verify_block,
    verify_tokens,
)


@Rule
def recover_from_target(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M2: after a rejection, samples from the target distribution instead of the residual."""
    accepted = verify_tokens(target, draft, accept_uniforms, final_uniforms).accepted
    uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
    return Verification(accepted, target.at(accepted).draw(uniform))


@Rule
def accept_always(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """M3."""
    return verify_tokens(target, draft, torch.full_like(accept_uniforms, -1.0), final_uniforms)


@Rule
def reuse_accept_uniform(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M4: the uniform of the rejection also samples the recovered token."""
    reused = torch.cat([accept_uniforms, final_uniforms[:, -1:]], 1)
    return verify_tokens(target, draft, accept_uniforms, reused)


def share_draft_stream(source: UniformSource) -> UniformSource:
    """M4: accept tests use the stream that sampled the draft."""

    def shared(seeds: Tensor, positions: Tensor, roles: Tensor, origins: Tensor) -> Tensor:
        return source(seeds, positions, torch.where(roles == Role.ACCEPT, int(Role.DRAFT), roles), origins)

    return shared


@Rule
def accept_at_equality(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M5: u <= target/draft, which accepts an impossible token at u = 0 and is undetectable otherwise."""
    return verify_tokens(target, draft, accept_uniforms - 2.0**-54, final_uniforms)


@Rule
def argmax_for_draw(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M6: takes the argmax instead of sampling."""
    accepted = verify_tokens(target, draft, accept_uniforms, final_uniforms).accepted
    return Verification(accepted, final_distribution(target, draft, accepted).dense().argmax(-1))


@Rule
def wrong_accept_row(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M7: draft token i is verified against target row i + 1."""
    shifted = Dense(target.dense().roll(-1, 1)) if draft.tokens.shape[1] else target
    accepted = verify_tokens(shifted, draft, accept_uniforms, final_uniforms).accepted
    return draw_final(target, draft, accepted, final_uniforms)


@Rule
def wrong_bonus_row(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M7: the bonus token is sampled from the previous row."""
    right = verify_tokens(target, draft, accept_uniforms, final_uniforms)
    if not draft.tokens.shape[1]:
        return right
    bonus = target.at((right.accepted - 1).clamp(min=0)).draw(final_uniforms[:, -1])
    return Verification(right.accepted, torch.where(right.accepted == draft.num_proposed, bonus, right.next_token))


@Rule
def block_with_token_residual(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M12: block verification with the residual of token verification."""
    accepted = verify_block(target, draft, accept_uniforms, final_uniforms).accepted
    return draw_final(target, draft, accepted, final_uniforms)


@Rule
def block_by_weight(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """M18: block verification in which every position passes with its weight, as only the last one may.

    Seen with drafts that are one-hot, whose weight is the target's probability of the draft so far.
    """
    weights = block_weights(target, draft)
    position = torch.arange(1, draft.tokens.shape[1] + 1, device=draft.tokens.device)
    passed = (accept_uniforms < weights[:, 1:]) & (position <= draft.num_proposed.unsqueeze(1))
    none = torch.zeros_like(draft.num_proposed).unsqueeze(1)
    accepted = torch.cat([none, torch.where(passed, position, 0)], 1).amax(1)
    return draw_final(target, draft, accepted, final_uniforms, weights.gather(1, accepted.unsqueeze(1)))


@Rule
def accept_padding(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """M19: a row whose draft is shorter than its batch mates' accepts the padding after it."""
    right = verify_tokens(target, draft, accept_uniforms, final_uniforms)
    everything = torch.full_like(right.accepted, draft.tokens.shape[1])
    padded = Verification(everything, target.at(everything).draw(final_uniforms[:, -1]))
    is_padded = (right.accepted == draft.num_proposed) & (draft.num_proposed < everything)
    pairs = zip((padded.accepted, padded.next_token), (right.accepted, right.next_token), strict=True)
    return Verification(*(torch.where(is_padded, wrong, sound) for wrong, sound in pairs))
