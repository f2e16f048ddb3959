"""Greedy drafts at any temperature: proposed with certainty, and exact under each rule.

An engine that declared the sampling distribution for tokens it had chosen greedily would be lossy; a control shows that
the enumeration sees it.
"""

from __future__ import annotations

from functools import partial

import pytest

from specdec import Engine, SamplingParams
from specdec.assembly import VERIFICATIONS
from specdec.conformance.enumeration import exact_distribution
from specdec.conformance.gates import distance
from specdec.conformance.toys import FeatureTarget, ToyHead, joint_distribution, table
from specdec.decoding import Decoder
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.proposers.hybrid import HybridProposer
from specdec.proposers.ngram import LookupIndex, NgramProposer
from specdec.sampling.distributions import Dense, OneHot
from specdec.sampling.state import RowParams
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree
from specdec.verification import Draft

TARGET, DRAFT = FeatureTarget(table(0)), MarkovModel(table(3))
PROMPT = (0, 1, 2, 0)
TREE = Tree(((0,), (1,), (0, 0), (0, 1)))


def head(source, tree=None):
    return EagleProposer(ToyHead(DRAFT), source, tree=tree)


def draft_model(source):
    return DraftModelProposer(DRAFT, source)


def hybrid(source):
    return HybridProposer(NgramProposer(3, TARGET.device, partial(LookupIndex, 2, 2)), head(source))


def make(propose, num_tokens: int, **options):
    def decoder(source, rule, max_batch_size):
        return Decoder(
            TARGET,
            propose(source),
            num_tokens,
            max_batch_size=max_batch_size,
            rule=rule,
            uniforms=source,
            greedy_drafts=True,
            **options,
        )

    return decoder


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("propose", [draft_model, head, hybrid])
def test_chains_have_the_exact_joint_distribution(propose, rule: str) -> None:
    found = exact_distribution(make(propose, 2), PROMPT, 3, (1, 12, 12), rule=VERIFICATIONS[rule])
    assert distance(found, joint_distribution(TARGET, PROMPT, 3)) < 1e-12


def test_recorded_chains_have_the_exact_joint_distribution() -> None:
    found = exact_distribution(make(head, 2, records=True), PROMPT, 3, (1, 12, 12))
    assert distance(found, joint_distribution(TARGET, PROMPT, 3)) < 1e-12


def test_trees_have_the_exact_joint_distribution() -> None:
    decoder = make(partial(head, tree=TREE), len(TREE))
    found = exact_distribution(decoder, PROMPT, 2, (1, 12, 12), rule=verify_tree, tree=TREE)
    assert distance(found, joint_distribution(TARGET, PROMPT, 2)) < 1e-12


def test_tokens_chosen_greedily_but_declared_as_sampled_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(self, logits, tokens=None, *, of_draft=False):
        probs, finite = self._probabilities(logits)
        return (Greedy(probs) if of_draft else Dense(probs)), finite

    class Greedy(Dense):
        def draw(self, uniforms):
            return self.probs.argmax(-1)

        def __getitem__(self, index):
            return Greedy(self.probs[index])

    monkeypatch.setattr(RowParams, "distribution", sampled)
    found = exact_distribution(make(head, 2), PROMPT, 3, (1, 12, 12))
    assert distance(found, joint_distribution(TARGET, PROMPT, 3)) > 0.01


def first_draft(**sampling) -> Draft:
    """The first draft of an engine with greedy drafts."""
    engine = Engine(TARGET, method="draft_model", draft=DRAFT, draft_sampling="greedy", num_speculative_tokens=3)
    drafts = []
    propose = engine._decoder.proposer.propose
    engine._decoder.proposer.propose = lambda *arguments: drafts.append(propose(*arguments)) or drafts[-1]
    engine.generate([[0]], SamplingParams(max_tokens=4, seed=1, **sampling))
    return drafts[0]


@pytest.mark.parametrize("penalties", [{}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}])
def test_a_draft_is_the_one_of_temperature_0(penalties: dict) -> None:
    draft, greedy = first_draft(**penalties), first_draft(temperature=0, **penalties)
    assert isinstance(draft.distribution, OneHot)
    assert draft.tokens.tolist() == greedy.tokens.tolist()
    assert draft.tokens.tolist() == draft.distribution.tokens.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_coupled_verification_gives_the_same_tokens_as_without_a_draft(temperature: float) -> None:
    sampling, options = SamplingParams(max_tokens=12, seed=1, temperature=temperature), {"verification": "coupled"}
    engine = Engine(TARGET, method="draft_model", draft=DRAFT, draft_sampling="greedy", max_batch_size=2, **options)
    completions = engine.generate([[0, 1], [2]], sampling)
    plain = Engine(TARGET, **options).generate([[0, 1], [2]], sampling)
    assert [each.token_ids for each in completions] == [each.token_ids for each in plain]
    assert sum(each.counts.num_accepted for each in completions) > 0


def test_methods_without_a_model_refuse_the_option() -> None:
    with pytest.raises(ValueError, match="draft_sampling='greedy' must be left out with method='ngram', which samples"):
        Engine(TARGET, method="ngram", draft_sampling="greedy")
    with pytest.raises(ValueError, match="draft_sampling='argmax' must be"):
        Engine(TARGET, method="draft_model", draft=DRAFT, draft_sampling="argmax")
