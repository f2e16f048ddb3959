"""Broken samplers, each a bug that a real engine shipped: the negative controls of every instrument.

A mutant is a decoder with one bug. `MUTANTS` has M1 to M13, some in two variants; `TREE_MUTANTS` has T1 to T4, the
additional ones of token trees. They work with any target and any sampling proposer, so they can be planted in a real
engine. `WINDOW_MUTANTS` are for targets with a sliding window; `STATE_MUTANTS`, S1 to S4, for those with recurrent
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.constraints.progress import Progress, masks
from specdec.decoding import Decoder
from specdec.models.base import LanguageModel, score
from specdec.models.causal import CausalLM
from specdec.models.state.recurrent import StateRing
from specdec.models.state.windows import LocalAttention
from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.tree import tree_uniforms
from specdec.requests import Batch, Generation
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Dense, Distribution
from specdec.sampling.randomness import Role, UniformSource, uniforms
from specdec.sampling.state import RowParams, SamplingState
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree
from specdec.verification import (
    Draft,
    Rule,
    Verification,
    VerificationRule,
    draw_final,
    final_distribution,
    verify_block,
    verify_tokens,
)

Maker = Callable[[UniformSource, VerificationRule, int], Decoder]


class Plant(Protocol):
    """Makes decoders of a pair with a planted bug; see `maker`. `MUTANTS` lists them by name."""

    def __call__(self, target: Any, draft: Any, gamma: int, **parts: Any) -> Maker: ...


def maker(
    target: Any,
    draft: Any,
    gamma: int,
    decoder: type[Decoder] = Decoder,
    proposer: Callable[[Any, UniformSource], Proposer] = DraftModelProposer,
    break_target: Callable[[Any], Any] = lambda target: target,
    break_proposer: Callable[[Proposer], Proposer] = lambda proposer: proposer,
    break_rule: Callable[[VerificationRule], VerificationRule] = lambda rule: rule,
    break_uniforms: Callable[[UniformSource], UniformSource] = lambda source: source,
    records: bool | None = None,
) -> Maker:
    """A function that makes decoders of this pair from (uniforms, rule, max_batch_size), with some parts replaced.

    target: a LanguageModel. draft: passed to the proposer together with the uniform source.
    gamma: tokens proposed per step.
    """

    def make(
        source: UniformSource = uniforms, rule: VerificationRule = verify_tokens, max_batch_size: int = 1
    ) -> Decoder:
        source = break_uniforms(source)
        return decoder(
            break_target(target),
            break_proposer(proposer(draft, source)),
            gamma,
            max_batch_size=max_batch_size,
            rule=break_rule(rule),
            uniforms=source,
            records=records,
        )

    return make


# ---- proposers


class GreedyDraftDeclaredSampled(Proposer):
    """M1: proposes the most probable token but declares the full distribution."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self.feature_layers = proposer.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self._proposer.propose(batch, limits)
        return replace(draft, tokens=draft.distribution.dense().argmax(-1)) if draft.tokens.shape[1] else draft


class SampledDraftDeclaredOneHot(GreedyDraftDeclaredSampled):
    """Not a bug, though it resembles M1: the output is lossless conditional on the draft token."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self._proposer.propose(batch, limits)
        return Draft.deterministic(draft.tokens, draft.num_proposed, batch.sampling.vocab_size)


class NeverProposes(GreedyDraftDeclaredSampled):
    """M13: speculation is silently off. The output is lossless; only the counts reveal it."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        return Draft.empty(len(batch.rows), batch.sampling.vocab_size, batch.sampling.device)


class StaleDraftCache(DraftModelProposer):
    """M9: after full acceptance the draft model never sees its own last token. Lossless, but the draft is worse."""

    def _catch_up(self, batch: Batch, texts: Sequence[list[int]], most: int) -> Tensor:
        for slot, row, tokens in zip(self._slots, batch.rows, texts, strict=False):
            if row and slot.owner is row and slot.num_valid(row, tokens) == len(tokens) - 2:
                slot.drafted = [*slot.drafted, tokens[-2]]
        return super()._catch_up(batch, texts, most)


# ---- rules and uniforms


def with_rule(broken: VerificationRule) -> Callable[[VerificationRule], VerificationRule]:
    """Replace the rule but still call the original, in case it records its calls."""

    def break_rule(rule: VerificationRule) -> VerificationRule:
        @Rule
        def both(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
            rule(target, draft, accept_uniforms, final_uniforms)
            return broken(target, draft, accept_uniforms, final_uniforms)

        return both

    return break_rule


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


# ---- the loop


class _BrokenLoop(Decoder):
    """A decoder whose step is composed of replaceable parts."""

    runs_ahead = False


class TopKOnOneSide(_BrokenLoop):
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


class IgnoredStop(_BrokenLoop):
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


class SoftGreedy(_BrokenLoop):
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


# ---- constraints: these do something only where a request has one, so they are not of the list


def unconstrained(batch: Batch) -> Batch:
    """A batch without constraints."""
    sampling = batch.sampling
    free = SamplingState(
        sampling.params,
        [row.request.prompt if row else () for row in batch.rows],
        [row.output if row else () for row in batch.rows],
        sampling.vocab_size,
        sampling.device,
        coupled=sampling.rows.coupled,
    )
    return replace(batch, sampling=free)


class UnconstrainedTarget(_BrokenLoop):
    """The constraint is applied to the draft only."""

    def _verify(self, batch: Batch, logits: Tensor, draft: Draft) -> tuple[Verification, Tensor]:
        return super()._verify(unconstrained(batch), logits, draft)


class UnconstrainedDraft(DraftModelProposer):
    """Not a bug: the constraint applies to the target only, and the draft declares the distribution it used."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        return super().propose(unconstrained(batch), limits)


class UnconstrainedDraw(UnconstrainedDraft):
    """Declares the constrained distribution but samples without the constraint."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft, rows = super().propose(batch, limits), [row.progress if row else None for row in batch.rows]
        if not draft.tokens.shape[1]:
            return draft
        allowed = masks(rows, draft.tokens[:, :-1], draft.tokens.shape[1], draft.distribution.vocab_size)
        probs = draft.distribution.dense() * allowed.to(draft.tokens.device)
        return replace(draft, distribution=Dense(probs / probs.sum(-1, keepdim=True)))


class _KeepsRejected(Progress):
    """Continues from the end of the last draft although part of it was rejected."""

    def emit(self, tokens: Sequence[int]) -> None:
        longest = max(map(len, self._states))
        drafted = next(list(text) for text in self._states if len(text) == longest)
        super().emit(tokens if list(tokens[: len(drafted)]) == drafted else [*drafted, *tokens[-1:]])


class ConstraintNotRolledBack(_BrokenLoop):
    """Rejected tokens remain in a row's progress."""

    def _prefill(self, row: Generation, cache: Any, slot: int) -> None:
        super()._prefill(row, cache, slot)
        if row.progress:
            row.progress.__class__ = _KeepsRejected


# ---- token trees


def tree_maker(target: Any, draft: Any, tree: Tree, **parts: Any) -> Maker:
    """`maker` with tree drafts; use it with the rule `verify_tree`. parts: see `maker`."""
    proposer: Any = parts.pop("proposer", DraftModelProposer)
    return maker(target, draft, len(tree), proposer=partial(proposer, tree=tree), **parts)


class SiblingsWithReplacement(Proposer):
    """T1: samples siblings with replacement but verifies as if without."""

    def __init__(self, proposer: Any) -> None:
        self._proposer = proposer
        self.feature_layers = proposer.feature_layers

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft: Draft = self._proposer.propose(batch, limits)
        return draft if draft.tree is None else self._with_replacement(batch, draft)

    def _with_replacement(self, batch: Batch, draft: Draft) -> Draft:
        assert draft.tree
        tree, origins = draft.tree, upload(batch.num_tokens(), draft.tokens.device)
        draws = tree_uniforms(batch.sampling.rows, origins, tree, self._proposer._uniforms)
        return replace(draft, tokens=draft.distribution[:, list(map(tree.families.index, tree.parents))].draw(draws))


class LateSiblingsWithReplacement(SiblingsWithReplacement):
    """T1 below the first level only, where few tests would notice."""

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        right: Draft = self._proposer.propose(batch, limits)
        if right.tree is None:
            return right
        late = torch.tensor(right.tree.depths, device=right.tokens.device) > 1
        return replace(right, tokens=torch.where(late, self._with_replacement(batch, right).tokens, right.tokens))


@Rule
def wrong_parent_row(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """T2: the children of a node are verified with the target distribution of its parent."""
    before = [0, *range(draft.tokens.shape[1])]
    return verify_tree(Dense(target.dense()[:, before]), draft, accept_uniforms, final_uniforms)


class StaleMask(_BrokenLoop):
    """T3: scores a tree with a causal mask, as if it were a chain."""

    def _score(self, batch: Batch, draft: Draft, cache: Any) -> Tensor:
        cache.num_cached[: len(batch.rows)] = [length - 1 for length in batch.num_tokens()]
        tokens = torch.cat([upload(batch.last_tokens(), self.target.device).unsqueeze(1), draft.tokens], 1)
        return score(self.target, tokens, cache, self.recorder)


class CompactsOffByOne(_BrokenLoop):
    """T4: keeps the cache entry of the node preceding the accepted one."""

    def _compact(self, cache: Any, origins: Tensor, path: Tensor) -> None:
        super()._compact(cache, origins, (path - 1).clamp(min=0))


class NeverCompacts(_BrokenLoop):
    """T4: does not move the cache entries of the accepted path."""

    def _compact(self, cache: Any, origins: Tensor, path: Tensor) -> None:
        pass


# ---- sliding windows


class _FewColumns(LocalAttention):
    """A ring of just the window: draft tokens overwrite what is attended to after their rejection."""

    def num_columns(self, capacity: int) -> int:
        return min(capacity, self.size)

    def reaches(self, num_tokens: int, num_written: int, capacity: int) -> bool:
        return True


class _BySlot(LocalAttention):
    """Takes columns for positions, which is right until the ring is overwritten."""

    def places(self, ends: Tensor, capacity: int, extent: int) -> Tensor:
        return torch.arange(extent, device=ends.device).expand(len(ends), -1)


def with_window(broken: Callable[[LocalAttention], LocalAttention]) -> Callable[[Any], Any]:
    """Replace the local attention of each layer of a CausalLM that has one."""

    def break_target(target: Any) -> Any:
        wrong = copy(target)
        wrong.local = tuple(local and broken(local) for local in target.local)
        return wrong

    return break_target


BROKEN_WINDOWS: dict[str, Callable[[LocalAttention], LocalAttention]] = {
    "W1 ring overwritten before the rollback": lambda local: _FewColumns(local.size, local.is_chunked),
    "W2 window by slot": lambda local: _BySlot(local.size, local.is_chunked),
    "W3 window too long": lambda local: replace(local, size=local.size + 1),
    "W3 window too short": lambda local: replace(local, size=local.size - 1),
}

WINDOW_MUTANTS: dict[str, Plant] = {
    name: partial(maker, break_target=with_window(broken)) for name, broken in BROKEN_WINDOWS.items()
}

TREE_MUTANTS: dict[str, Callable[..., Maker]] = {  # called like `tree_maker`
    "T1 siblings with replacement": partial(tree_maker, break_proposer=SiblingsWithReplacement),
    "T1 late siblings with replacement": partial(tree_maker, break_proposer=LateSiblingsWithReplacement),
    "T2 wrong parent row": partial(tree_maker, break_rule=with_rule(wrong_parent_row)),
    "T3 stale mask": partial(tree_maker, decoder=StaleMask),
    "T4 compaction off by one": partial(tree_maker, decoder=CompactsOffByOne),
    "T4 no compaction": partial(tree_maker, decoder=NeverCompacts),
}

# ---- recurrent states


class StaleState(StateRing):
    """S1: after a rejection, continues from the state after the last token that was fed."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [max(self.lengths(slot)) if length else 0 for slot, length in pairs])

    def truncate(self, slot: int, length: int) -> None:
        if length == 0:
            super().truncate(slot, length)


class StateOfPreviousToken(StateRing):
    """S2: continues from the state before the last accepted token, where it is kept."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [length - (length - 1 in self.lengths(slot)) for slot, length in pairs])


class ShiftedState(StateRing):
    """S3: the columns of a convolution's inputs are off by one."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        states = super().read(first_slot, lengths)
        return None if states is None else states.roll(1, -1)


class KeptState(StateRing):
    """S4: a slot given to another sequence keeps the state of the one before."""

    def read(self, first_slot: int, lengths: Sequence[int]) -> Tensor | None:
        slots = range(first_slot, first_slot + len(lengths))
        pairs = zip(slots, lengths, strict=True)
        return super().read(first_slot, [length or max(self.lengths(slot), default=0) for slot, length in pairs])

    def truncate(self, slot: int, length: int) -> None:
        if length:
            super().truncate(slot, length)


def with_rings(ring: type[StateRing], kinds: Sequence[str] = ("conv", "recurrent")) -> Callable[[CausalLM], Any]:
    """Replace the rings of these kinds of states in the caches of a model with recurrent layers."""

    def broken(model: CausalLM) -> CausalLM:
        def allocate(num_slots: int, capacity: int, **options: Any) -> Any:
            cache: Any = model.allocate(num_slots, capacity, **options)
            depth = options["max_rollback"] + 1
            cache.new_ring = lambda kind: (ring if kind in kinds else StateRing)(num_slots, depth)
            return cache

        twin = copy(model)
        twin.allocate = allocate  # type: ignore[method-assign]
        return twin

    return broken


STATE_MUTANTS: dict[str, Plant] = {  # of targets with recurrent layers
    "S1 stale state": partial(maker, break_target=with_rings(StaleState)),
    "S2 state of the previous token": partial(maker, break_target=with_rings(StateOfPreviousToken)),
    "S3 convolution off by one": partial(maker, break_target=with_rings(ShiftedState, ("conv",))),
    "S4 refilled slot keeps its state": partial(maker, break_target=with_rings(KeptState)),
}

MUTANTS: dict[str, Plant] = {
    "M1 greedy draft declared as sampled": partial(maker, break_proposer=GreedyDraftDeclaredSampled),
    "M2 recover from the target": partial(maker, break_rule=with_rule(recover_from_target)),
    "M3 accept always": partial(maker, break_rule=with_rule(accept_always)),
    "M4 accept uniform reused": partial(maker, break_rule=with_rule(reuse_accept_uniform)),
    "M4 draft stream shared": partial(maker, break_uniforms=share_draft_stream),
    "M5 accept at equality": partial(maker, break_rule=with_rule(accept_at_equality)),
    "M6 argmax for a draw": partial(maker, break_rule=with_rule(argmax_for_draw)),
    "M7 wrong accept row": partial(maker, break_rule=with_rule(wrong_accept_row)),
    "M7 wrong bonus row": partial(maker, break_rule=with_rule(wrong_bonus_row)),
    "M8 top-k on one side": partial(maker, decoder=TopKOnOneSide),
    "M9 no rollback": partial(maker, break_target=ForgetsRollback, records=False),
    "M10 stop token ignored": partial(maker, decoder=IgnoredStop),
    "M10 max_tokens ignored": partial(maker, decoder=OverlongDraft),
    "M11 soft greedy": partial(maker, decoder=SoftGreedy),
    "M12 token residual under block": partial(maker, break_rule=with_rule(block_with_token_residual)),
    "M13 speculation silently off": partial(maker, break_proposer=NeverProposes),
}
