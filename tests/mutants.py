"""Broken samplers, each a bug that a real engine shipped: the negative controls of every gate.

A mutant is a decoder class with one thing wrong. `MUTANTS` names them M1 to M11; where a bug has two shapes, both
are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from specdec.decoding import Decoder
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.randomness import Role, UniformSource
from specdec.requests import Generation
from specdec.sampling import Dense, SamplingState
from specdec.verification import (
    Draft,
    Verification,
    VerificationRule,
    draw_last,
    final_law,
    verify_block,
    verify_tokens,
)

Maker = Callable[[UniformSource, VerificationRule, int], Decoder]


def maker(
    target: MarkovModel,
    draft: MarkovModel,
    gamma: int,
    decoder: type[Decoder] = Decoder,
    proposer: type[DraftModelProposer] = DraftModelProposer,
    break_rule: Callable[[VerificationRule], VerificationRule] = lambda rule: rule,
    break_uniforms: Callable[[UniformSource], UniformSource] = lambda source: source,
    records: bool | None = None,
) -> Maker:
    """A function that makes decoders of this pair from (uniforms, rule, max_batch_size), with parts replaced."""

    def make(uniforms: UniformSource, rule: VerificationRule, max_batch_size: int) -> Decoder:
        uniforms = break_uniforms(uniforms)
        return decoder(
            target,
            proposer(draft, uniforms),
            gamma,
            max_batch_size=max_batch_size,
            rule=break_rule(rule),
            uniforms=uniforms,
            records=records,
        )

    return make


class GreedyDraftDeclaredSampled(DraftModelProposer):
    """M1: drafts the most probable token but declares the law it did not draw from."""

    def propose(self, batch, limits):
        draft = super().propose(batch, limits)
        return replace(draft, tokens=draft.law.dense().argmax(-1)) if draft.tokens.shape[1] else draft


class SampledDraftDeclaredOneHot(DraftModelProposer):
    """No bug, though it looks like M1: what is accepted given the draft token has the target's law for any token."""

    def propose(self, batch, limits):
        draft = super().propose(batch, limits)
        return Draft.deterministic(draft.tokens, draft.lengths, batch.sampling.vocab_size)


def with_rule(broken: VerificationRule):
    """Replace the rule, keeping whatever records its calls around it."""

    def break_rule(rule: VerificationRule) -> VerificationRule:
        def both(target, draft, accept_uniforms, final_uniforms):
            rule(target, draft, accept_uniforms, final_uniforms)
            return broken(target, draft, accept_uniforms, final_uniforms)

        return both

    return break_rule


def recover_from_target(target, draft, accept_uniforms, final_uniforms):
    """M2: after a rejection draws from the target's law, not from the residual."""
    accepted = verify_tokens(target, draft, accept_uniforms, final_uniforms).accepted
    uniform = final_uniforms.gather(1, accepted.unsqueeze(1)).squeeze(1)
    return Verification(accepted, target.at(accepted).draw(uniform))


def accept_always(target, draft, accept_uniforms, final_uniforms):
    """M3."""
    return verify_tokens(target, draft, torch.full_like(accept_uniforms, -1.0), final_uniforms)


def reuse_accept_uniform(target, draft, accept_uniforms, final_uniforms):
    """M4: the uniform that rejected also draws the recovered token."""
    reused = torch.cat([accept_uniforms, final_uniforms[:, -1:]], 1)
    return verify_tokens(target, draft, accept_uniforms, reused)


def share_draft_stream(source: UniformSource) -> UniformSource:
    """M4: accepting reads the stream that the draft was drawn from."""

    def shared(seeds, positions, roles, origins):
        return source(seeds, positions, torch.where(roles == Role.ACCEPT, int(Role.DRAFT), roles), origins)

    return shared


def accept_at_equality(target, draft, accept_uniforms, final_uniforms):
    """M5: u <= target/draft, which accepts an impossible token at u = 0."""
    return verify_tokens(target, draft, accept_uniforms - 2.0**-54, final_uniforms)


def argmax_for_draw(target, draft, accept_uniforms, final_uniforms):
    """M6: takes the most probable token where a draw is meant."""
    accepted = verify_tokens(target, draft, accept_uniforms, final_uniforms).accepted
    return Verification(accepted, final_law(target, draft, accepted).dense().argmax(-1))


def wrong_accept_row(target, draft, accept_uniforms, final_uniforms):
    """M7: draft token i is tested against the target's row i + 1."""
    shifted = Dense(target.dense().roll(-1, 1)) if draft.tokens.shape[1] else target
    accepted = verify_tokens(shifted, draft, accept_uniforms, final_uniforms).accepted
    return draw_last(target, draft, accepted, final_uniforms)


def wrong_bonus_row(target, draft, accept_uniforms, final_uniforms):
    """M7: the bonus token is drawn from the row before its own."""
    right = verify_tokens(target, draft, accept_uniforms, final_uniforms)
    if not draft.tokens.shape[1]:
        return right
    bonus = target.at((right.accepted - 1).clamp(min=0)).draw(final_uniforms[:, -1])
    return Verification(right.accepted, torch.where(right.accepted == draft.lengths, bonus, right.next_token))


def block_with_token_residual(target, draft, accept_uniforms, final_uniforms):
    """M12: block verification, but the recovered token comes from token verification's residual."""
    accepted = verify_block(target, draft, accept_uniforms, final_uniforms).accepted
    return draw_last(target, draft, accepted, final_uniforms)


class TopKOnOneSide(Decoder):
    """M8: the bonus and recovered tokens come from the law without top-k, whatever was asked."""

    def _verify(self, batch, logits, draft):
        outcome = super()._verify(batch, logits, draft)
        unlimited = [replace(params, top_k=0) for params in batch.sampling.params]
        nothing = [()] * len(unlimited)
        state = SamplingState(unlimited, nothing, nothing, batch.sampling.vocab_size, batch.sampling.device)
        law = final_law(state.law(logits, draft.tokens), draft, outcome.accepted)
        uniform = (
            self._draws(batch.sampling.rows, torch.tensor(batch.lengths()), draft)[1]
            .gather(1, outcome.accepted.unsqueeze(1))
            .squeeze(1)
        )
        return replace(outcome, next_token=law.draw(uniform))


class ForgetsRollback(MarkovModel):
    """M9: a target that appends behind whatever it wrote last, rejected tokens included."""

    def allocate(self, num_slots, capacity, **options):
        self._written = [0] * num_slots
        return super().allocate(num_slots, 4 * capacity, **options)

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        right, width = list(cache.lengths), tokens.shape[1]
        for slot in range(first_slot, first_slot + len(tokens)):
            cache.lengths[slot] = max(right[slot], self._written[slot]) if right[slot] else 0
            self._written[slot] = cache.lengths[slot] + width
        logits = super().forward(tokens, cache, first_slot, last_only)
        cache.lengths[:] = right
        return logits


class StaleDraftCache(DraftModelProposer):
    """M9: after full acceptance the draft model never sees its own last token. Lossless, but the draft is worse."""

    def _catch_up(self, batch):
        for slot, row in zip(self._slots, batch.rows, strict=False):
            if row and slot.owner is row and slot.num_valid(row) == len(row.tokens) - 2:
                slot.drafted = [*slot.drafted, row.tokens[-2]]
        return super()._catch_up(batch)


def emit_everything(row: Generation, tokens: list[int]) -> int:
    """`Generation.emit` that looks at the last token of a step only, and cuts nothing."""
    row.tokens += tokens
    if tokens[-1] in row.request.stop_token_ids:
        row.finish_reason = "stop"
    elif row.num_remaining <= 0:
        row.finish_reason = "length"
    return len(tokens)


class IgnoredStop(Decoder):
    """M10: a stop token inside an accepted run is passed over."""

    def _commit(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Generation, "emit", emit_everything)
            super()._commit(*args)


class OverlongDraft(IgnoredStop):
    """M10: forgets that `max_tokens` bounds the draft, and does not cut the output."""

    def _propose(self, batch):
        limits = [self.num_speculative_tokens if row else 0 for row in batch.rows]
        return self.proposer.propose(batch, limits)


class SoftGreedy(Decoder):
    """M11: at temperature 0 a draft token is tested against the softmax, so that another than the argmax can pass."""

    def _verify(self, batch, logits, draft):
        accept_uniforms, final_uniforms = self._draws(batch.sampling.rows, torch.tensor(batch.lengths()), draft)
        accepted = verify_tokens(Dense(logits.softmax(-1)), draft, accept_uniforms, final_uniforms).accepted
        law = batch.sampling.law(logits, draft.tokens)
        return Verification(accepted, final_law(law, draft, accepted).draw(final_uniforms[:, 0]))
