"""Bugs of the decode loop around the rule: parameters, rollback, ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specdec.conformance.mutants.planting import BrokenLoop
from specdec.decoding import Flight
from specdec.models.base import LanguageModel
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Dense
from specdec.sampling.state import RowParams, SamplingState
from specdec.verification import (
    Draft,
    Rule,
    Verification,
    VerificationRule,
    draw_final,
    final_distribution,
    verify_tokens,
)


class TopKOnOneSide(BrokenLoop):
    """M8: bonus and recovered tokens ignore top-k."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        outcome, finite = super()._verify(batch, logits, draft)
        unlimited = [replace(params, top_k=0) for params in batch.sampling.params]
        nothing: list[tuple[int, ...]] = [()] * len(unlimited)
        state = SamplingState(unlimited, nothing, nothing, batch.sampling.vocab_size, batch.sampling.device)
        distribution = final_distribution(state.distribution(logits, draft.tokens)[0], draft, outcome.accepted)
        final_uniforms = self._draws(batch.sampling.rows, upload(batch.num_tokens(), logits.device), draft)[1]
        uniform = final_uniforms.gather(1, outcome.accepted.unsqueeze(1)).squeeze(1)
        return replace(outcome, next_token=distribution.draw(uniform)), finite


class ForgetsRollback(LanguageModel):
    """M9: a target that appends to whatever it wrote last, including rejected tokens, while there is room."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.vocab_size, self.device = model.vocab_size, model.device
        self.context_length = model.context_length

    def allocate(self, num_slots: int, capacity: int, **options: Any) -> Any:
        self._written = [0] * num_slots
        return self._model.allocate(num_slots, 4 * capacity, **options)

    def forward(self, tokens: Tensor, cache: Any, first_slot: int = 0, last_only: bool = False) -> Tensor:
        right, width = list(cache.num_cached), tokens.shape[1]
        for slot in range(first_slot, first_slot + len(tokens)):
            behind = max(right[slot], self._written[slot]) if right[slot] else 0
            cache.num_cached[slot] = behind if behind + width <= cache.capacity else right[slot]
            self._written[slot] = cache.num_cached[slot] + width
        logits: Tensor = self._model.forward(tokens, cache, first_slot, last_only)
        cache.num_cached[:] = right
        return logits


class _Endless(Generation):
    """Checks only the last token of a step and truncates nothing."""

    __slots__ = ()

    def emit(self, tokens: Sequence[int]) -> int:
        self.tokens += tokens
        if tokens[-1] in self.request.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_remaining <= 0:
            self.finish_reason = "length"
        return len(tokens)


class IgnoredStop(BrokenLoop):
    """M10: a stop token inside an accepted run is ignored."""

    def _prefill(self, row: Generation, cache: Any, slot: int) -> None:
        row.__class__ = _Endless
        super()._prefill(row, cache, slot)


class OverlongDraft(IgnoredStop):
    """M10: `max_tokens` neither bounds the draft nor truncates the output."""

    def _propose(self, batch: Batch) -> Draft:
        assert self.proposer
        limits = [self.num_speculative_tokens if row else 0 for row in batch.rows]
        return self.proposer.propose(batch, limits)


class SoftGreedy(BrokenLoop):
    """M11: at temperature 0 a draft token is verified against the softmax, so a non-argmax token can pass."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        accept_uniforms, final_uniforms = self._draws(
            batch.sampling.rows, upload(batch.num_tokens(), logits.device), draft
        )
        soft = Dense(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1))
        accepted = verify_tokens(soft, draft, accept_uniforms, final_uniforms).accepted
        distribution, finite = batch.sampling.distribution(logits, draft.tokens)
        return draw_final(distribution, draft, accepted, final_uniforms), finite

    def _draws(self, rows: RowParams, origins: Tensor, draft: Draft) -> tuple[Tensor, Tensor]:
        return super()._draws(replace(rows, all_greedy=False), origins, draft)  # this rule needs uniforms


class ReusedProposalNoise(BrokenLoop):
    """M14: drafts and recovered tokens are drawn with the same noise per token of the vocabulary, in Gumbel form.

    A rejected token was proposed because its noise was good, so that the others' was worse than it should be when the
    token after the rejection is drawn. The acceptance test has a uniform of its own.
    """

    def __init__(self, *args: Any, rule: VerificationRule, **options: Any) -> None:
        super().__init__(*args, rule=Rule(rule, needs_noise=True), **options)

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        rows, origins = batch.sampling.rows, upload(batch.num_tokens(), logits.device)
        if rows.all_greedy:  # nothing is drawn
            return super()._verify(batch, logits, draft)
        distribution, finite = batch.sampling.distribution(logits, draft.tokens)
        accept_uniforms, _ = self._draws(replace(rows, coupled=False), origins, draft)
        _, noise = self._draws(rows, origins, draft)
        accepted = verify_tokens(distribution, draft, accept_uniforms, noise[..., 0]).accepted
        drawn = final_distribution(distribution, draft, accepted).draw(noise[torch.arange(len(accepted)), accepted])
        return Verification(accepted, drawn), finite


class PenaltiesOncePerStep(BrokenLoop):
    """M16: penalties count the tokens before a step, and not those of the draft."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        columns = [batch.sampling.distribution(column.unsqueeze(1)) for column in logits.unbind(1)]
        distribution = Dense(torch.cat([each.dense() for each, _ in columns], 1))
        finite = torch.cat([finite for _, finite in columns], 1)
        draws = self._draws(batch.sampling.rows, upload(batch.num_tokens(), logits.device), draft)
        return self.rule(distribution, draft, *draws), finite


class ParametersOnBonusOnly(BrokenLoop):
    """M17: min-p and logit bias apply to the bonus token, and neither to accepted nor to recovered ones."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        sampling = batch.sampling
        without = [replace(params, min_p=0.0, logit_bias={}) for params in sampling.params]
        prompts = [row.request.prompt if row else () for row in batch.rows]
        outputs = [row.output if row else () for row in batch.rows]
        bare = SamplingState(without, prompts, outputs, sampling.vocab_size, sampling.device)
        distribution, finite = bare.distribution(logits, draft.tokens)
        draws = self._draws(sampling.rows, upload(batch.num_tokens(), logits.device), draft)
        outcome = self.rule(distribution, draft, *draws)
        right, _ = sampling.distribution(logits, draft.tokens)
        uniform = draws[1].gather(1, outcome.accepted.unsqueeze(1)).squeeze(1)
        bonus = right.at(outcome.accepted).draw(uniform)
        is_bonus = outcome.accepted == draft.num_proposed
        return replace(outcome, next_token=torch.where(is_bonus, bonus, outcome.next_token)), finite


# ---- what a loop reports: outputs are right


class CountsAfterTheEnd(BrokenLoop):
    """M21: counts accepted tokens that the end of the output truncates."""

    def _commit(self, flight: Flight) -> list[tuple[int, int]]:
        decided = super()._commit(flight)
        busy = [row for row in flight.batch.rows if row]
        for row, (num_drafted, num_accepted) in zip(busy, decided, strict=True):
            row.steps[-1] = replace(row.steps[-1], num_drafted=num_drafted, num_accepted=num_accepted, last="bonus")
        return decided


class ConstantLogprobs(BrokenLoop):
    """M22: reports the same log-probability for every token."""

    def _commit(self, flight: Flight) -> list[tuple[int, int]]:
        decided = super()._commit(flight)
        for row in filter(None, flight.batch.rows):
            row.logprobs = [0.0] * len(row.logprobs)
        return decided


class DraftLogprobs(BrokenLoop):
    """M22: reports the draft's log-probabilities of accepted tokens."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        self._draft_probs = draft.distribution.prob(draft.tokens) if draft.tokens.shape[1] else None
        return super()._verify(batch, logits, draft)

    def _commit(self, flight: Flight) -> list[tuple[int, int]]:
        num_before = [len(row.logprobs) if row else 0 for row in flight.batch.rows]
        decided = super()._commit(flight)
        for index, row in enumerate(flight.batch.rows):
            if row and row.request.sampling.logprobs and self._draft_probs is not None and row.steps:
                num_accepted = min(row.steps[-1].num_accepted, len(row.logprobs) - num_before[index])
                wrong = self._draft_probs[index, :num_accepted].log().tolist()
                row.logprobs[num_before[index] : num_before[index] + num_accepted] = wrong
        return decided
