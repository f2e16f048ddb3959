"""The kit certifies the library's own proposers, and refuses each way to break one, in a sentence that says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from specdec.conformance import kit
from specdec.conformance.gates import distance, marginal, radius
from specdec.conformance.kit import certify_proposer
from specdec.conformance.mutants import GreedyDraftDeclaredSampled, NeverProposes, SampledDraftDeclaredOneHot
from specdec.conformance.probes import NotCertified, Steps
from specdec.conformance.toys import ToyHead, joint_distribution
from specdec.models.markov import MarkovModel
from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.requests import Batch
from specdec.sampling.distributions import Dense
from specdec.sampling.randomness import UniformSource
from specdec.sampling_params import SamplingParams
from specdec.trees.shape import Tree
from specdec.verification import Draft, verify_block, verify_coupled, verify_tokens


def draft_model(target: MarkovModel) -> MarkovModel:
    """Distributions without round numbers."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(target.table.shape, generator=generator, dtype=torch.float64) + 0.1
    return MarkovModel(probs / probs.sum(-1, keepdim=True))


def drawn(target: MarkovModel, uniforms: UniformSource) -> DraftModelProposer:
    return DraftModelProposer(draft_model(target), uniforms)


def copied(target: MarkovModel, uniforms: UniformSource) -> NgramProposer:
    return NgramProposer(target.vocab_size, target.device, partial(LookupIndex, 1, 2))


def head(target: MarkovModel, uniforms: UniformSource) -> EagleProposer:
    return EagleProposer(ToyHead(draft_model(target)), uniforms)


@pytest.mark.parametrize(("make_proposer", "num_mutants"), [(drawn, 3), (copied, 2), (head, 3)])
def test_lossless_proposers_are_certified(make_proposer, num_mutants: int) -> None:
    """A copy is certain, so that the mutant that proposes the likeliest token changes nothing of it."""
    certificate = certify_proposer(make_proposer)
    assert 0 < certificate.num_accepted < certificate.num_drafted
    assert certificate.num_mutants == num_mutants
    assert str(certificate).startswith("certified: exact on 2 toys, ")


class Broken(Proposer):
    """A proposer whose drafts are changed."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        draft = self.proposer.propose(batch, limits)
        return self.change(draft, batch) if draft.tokens.shape[1] else draft

    def change(self, draft: Draft, batch: Batch) -> Draft:
        raise NotImplementedError


class Rounded(Broken):
    """Declares its distribution as rounded to 16 bits."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        probs = draft.distribution.dense().bfloat16().double()
        return replace(draft, distribution=Dense(probs / probs.sum(-1, keepdim=True)))


class OwnGenerator(Broken):
    """Draws by a generator of its own."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        return replace(draft, tokens=draft.distribution.draw(torch.rand(draft.tokens.shape, dtype=torch.float64)))


class TooLong(Broken):
    def change(self, draft: Draft, batch: Batch) -> Draft:
        return replace(draft, num_proposed=draft.num_proposed + 1)


class EndsByItsDraw(Broken):
    """Takes a draft back if it is not token 0."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        return replace(draft, num_proposed=torch.where(draft.tokens[:, 0] == 0, draft.num_proposed, 0))


class WrongAfterItsFirstDraft(Broken):
    """Draws as declared only until it learns the outcome of a draft."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        is_later = torch.tensor([bool(row and row.steps) for row in batch.rows]).unsqueeze(1)
        return replace(draft, tokens=torch.where(is_later, draft.distribution.dense().argmax(-1), draft.tokens))


class OneRowForAll(Broken):
    """Declares the first row's distributions for every row."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        return replace(draft, distribution=Dense(draft.distribution.dense()[:1].expand(len(batch.rows), -1, -1)))


class NotNormalized(Broken):
    def change(self, draft: Draft, batch: Batch) -> Draft:
        return replace(draft, distribution=Dense(draft.distribution.dense() / 2))


def by_other_uniforms(target: MarkovModel, uniforms: UniformSource) -> Proposer:
    """Reads the uniforms that decide about accepting."""
    return drawn(target, lambda seeds, positions, roles, origins: uniforms(seeds, positions, roles + 1, origins))


def tree(target: MarkovModel, uniforms: UniformSource) -> Proposer:
    return DraftModelProposer(draft_model(target), uniforms, tree=Tree(((0,), (1,))))


DRAWN = r"draft token 1 after output \[\d\] and draft \[\] is \d with probability [\d.]+, but the draft declares 0\.\d+"
FAR = r"the output is at a distance of 0\.\d+ \(total variation\) from the target's distribution"
WRONG = {
    GreedyDraftDeclaredSampled: DRAWN,
    Rounded: DRAWN,
    OneRowForAll: DRAWN,
    SampledDraftDeclaredOneHot: "has a declared distribution that depends on the token drawn from it",
    OwnGenerator: "differs between two calls with the same uniforms; draw by those given",
    TooLong: r"row 0 of a draft has length 2, and must have at most 1",
    EndsByItsDraw: "is proposed or not by its own uniform; decide before it is drawn",
    WrongAfterItsFirstDraft: FAR,
    NotNormalized: "must have probabilities >= 0 that sum to 1",
    NeverProposes: "the proposer proposed nothing on the toys, so nothing is known about its drafts",
}


@pytest.mark.parametrize("broken", WRONG)
def test_a_broken_proposer_is_refused_in_a_sentence(broken: type) -> None:
    with pytest.raises(NotCertified, match=WRONG[broken]):
        certify_proposer(lambda target, uniforms: broken(drawn(target, uniforms)))


@pytest.mark.parametrize(
    ("make_proposer", "message"),
    [(by_other_uniforms, "must be drawn by the uniforms of Role.DRAFT"), (tree, "drafts trees, but the kit certifies")],
)
def test_proposers_that_the_kit_cannot_certify_are_refused(make_proposer, message: str) -> None:
    with pytest.raises(NotCertified, match=message):
        certify_proposer(make_proposer)


# -- the checks of ragged batches alone, which the exact ones come before ------------------------------------------


class WritesIntoTheText(Broken):
    """Takes its draft for emitted, every other time."""

    def change(self, draft: Draft, batch: Batch) -> Draft:
        for row, token in zip(batch.rows, draft.tokens[:, 0].tolist(), strict=True):
            if row and len(row.steps) % 2 and row.num_remaining > 2:
                row.tokens[-1] = token
        return draft


@pytest.mark.parametrize("rule", [verify_tokens, verify_block])
def test_the_gate_refuses_a_proposer_at_the_detectable_distance(rule) -> None:
    """By token verification the mutant's exact distance exceeds twice the radius, so that it cannot pass by chance."""
    toy, make_proposer = kit.TOYS[0], kit._wrap(drawn, GreedyDraftDeclaredSampled)
    found = kit._enumerate(replace(toy, stop_token_ids=()), make_proposer, Steps(replace(toy, stop_token_ids=())))
    truth = joint_distribution(toy.target, toy.prompt, toy.num_tokens)
    distances = [distance(marginal(found, (i, i + 1)), marginal(truth, (i, i + 1))) for i in range(3)]
    assert max(distances) > 2 * radius(kit.NUM_DRAWS, kit.SUPPORT), distances
    with pytest.raises(NotCertified, match=r"outputs in ragged batches are further from the target's distribution"):
        kit._gate(make_proposer, rule)


@pytest.mark.parametrize(
    ("rule", "params", "how"),
    [(verify_tokens, SamplingParams(temperature=0), "greedy"), (verify_coupled, SamplingParams(), "coupled")],
)
def test_outputs_that_are_not_plain_decodings_are_refused(rule, params: SamplingParams, how: str) -> None:
    with pytest.raises(NotCertified, match=f"{how} output must be that of plain decoding, but for prompt"):
        kit._check_identity(kit._wrap(drawn, WritesIntoTheText), rule, params)
