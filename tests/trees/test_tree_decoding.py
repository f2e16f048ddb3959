"""Trees through the real decoding loop: exact joint distribution, invariants, and planted bugs that are caught."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import tiny
from helpers.toys import Automaton, distribution_after, processed_distribution, top_k_distribution

from specdec import SamplingParams
from specdec.conformance import mutants
from specdec.conformance.enumeration import Each, Grid, Tokens, exact_distribution, pieces_between
from specdec.conformance.gates import distance, marginal, passes, radius
from specdec.conformance.mutants import tree_maker
from specdec.conformance.toys import FeatureTarget, ToyHead, joint_distribution, table
from specdec.decoding import Decoder
from specdec.heads.eagle import new_head
from specdec.kernels import cpp
from specdec.models.base import FINAL
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.heads.eagle import EagleProposer
from specdec.requests import Generation, Request, Step
from specdec.sampling.randomness import uniforms
from specdec.sampling.state import NonFiniteLogitsError
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_coupled_tree, verify_tree
from specdec.verification import Rule, verify_coupled, verify_tokens

# -- the joint distribution, exactly ----------------------------------------------------------------------------------

PROMPT = (1, 2)
PAIR = Tree(((0,), (1,)))
FORK = Tree(((0,), (1,), (0, 0)))
LATE_FORK = Tree(((0,), (0, 0), (0, 1)))
SECOND_FORK = Tree(((0,), (1,), (1, 0)))
# draws of halves, among them certain ones, which leave nothing for a second sibling
COINS = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1], [2, 0, 0], [0, 0, 2]]).double() / 2
TARGET_DISTRIBUTIONS = torch.tensor([[3, 0, 1], [1, 2, 1], [1, 1, 2], [0, 4, 0], [2, 2, 0], [0, 1, 3]]).double() / 4
TARGET, DRAFT = MarkovModel(table(3, TARGET_DISTRIBUTIONS)), MarkovModel(table(6, COINS))


def residual(target: list[float], draft: list[float]) -> list[float]:
    excess = [max(p - q, 0.0) for p, q in zip(target, draft, strict=True)]
    return [x / sum(excess) for x in excess] if sum(excess) > 1e-12 else target


def without(distribution: list[float], taken: Tokens) -> list[float]:
    """The distribution of the next sibling; one-hot on the lowest remaining token if no mass is left."""
    rest = [0.0 if token in taken else q for token, q in enumerate(distribution)]
    lowest = min(set(range(len(distribution))) - set(taken))
    return (
        [q / sum(rest) for q in rest] if sum(rest) else [float(token == lowest) for token in range(len(distribution))]
    )


DistributionOf = Callable[[MarkovModel, Tokens], list[float]]  # after an output


def all_drafts(
    tree: Tree, draft: MarkovModel, distribution_of: DistributionOf, output: Tokens
) -> Iterator[tuple[Tokens, list[list[float]]]]:
    """Every possible draft after an output, with the distribution that each node was sampled from."""
    found: list[tuple[Tokens, list[list[float]]]] = [((), [])]
    for node, parent in enumerate(tree.parents):
        longer = []
        for tokens, distributions in found:
            way = tuple(tokens[i] for i in tree.lineage(parent))
            taken = tuple(tokens[i] for i in range(node) if tree.parents[i] == parent)
            distribution = without(distribution_of(draft, (*output, *way)), taken)
            longer += [((*tokens, token), [*distributions, distribution]) for token, q in enumerate(distribution) if q]
        found = longer
    return iter(found)


def tree_grid(
    target: MarkovModel, draft: MarkovModel, tree: Tree, distribution_of: DistributionOf, output: Tokens
) -> Grid:
    """The thresholds of the step after an output, node by node, by the definitions."""
    drawn, accepted = ([set() for _ in tree.paths] for _ in range(2))
    last = set(itertools.accumulate(distribution_of(target, output)))
    for tokens, distributions in all_drafts(tree, draft, distribution_of, output) if output else ():
        after = {-1: distribution_of(target, output)}
        for node, (parent, q) in enumerate(zip(tree.parents, distributions, strict=True)):
            after[node] = distribution_of(target, (*output, *(tokens[i] for i in tree.lineage(node))))
            drawn[node].update(itertools.accumulate(q))
            accepted[node].add(after[parent][tokens[node]] / q[tokens[node]])
            last.update(itertools.accumulate(after[parent]))
            after[parent] = residual(after[parent], q)
        for distribution in after.values():
            last.update(itertools.accumulate(distribution))
    return Each(tuple(map(pieces_between, drawn))), Each(tuple(map(pieces_between, accepted))), pieces_between(last)


def exact(make, tree: Tree, num_tokens: int = 3, target=TARGET, draft=DRAFT, prompt=PROMPT, params=None) -> dict:
    def distribution_of(model: MarkovModel, output: Tokens) -> list[float]:
        return distribution_after(model, params or SamplingParams(), prompt, output)

    grid = partial(tree_grid, target, draft, tree, distribution_of)
    return exact_distribution(make, prompt, num_tokens, grid, params, verify_tree, tree=tree)


@pytest.mark.parametrize("stop", [(), (1,)])
@pytest.mark.parametrize("tree", [PAIR, FORK, LATE_FORK, SECOND_FORK], ids=lambda tree: str(tree.paths))
def test_joint_distribution_of_trees(tree: Tree, stop: tuple[int, ...]) -> None:
    """Rows accept different paths, so the batch is ragged; a tree of depth 2 is cut near the end of the output."""
    params = SamplingParams(stop_token_ids=stop)
    distribution = exact(tree_maker(TARGET, DRAFT, tree), tree, 4 if tree is PAIR else 3, params=params)
    assert distance(distribution, processed_distribution(TARGET, params, PROMPT, 4 if tree is PAIR else 3)) < 1e-12


@pytest.mark.parametrize("records", [False, True])
def test_joint_distribution_across_two_steps_of_a_tree(records: bool) -> None:
    """Five tokens: a path of two tokens off the first branch, then another step that reads its cache entries."""
    target, draft = MarkovModel(table(3, TARGET_DISTRIBUTIONS[[3, 4, 1]])), MarkovModel(table(5, COINS[[0, 1, 3]]))
    distribution = exact(tree_maker(target, draft, SECOND_FORK, records=records), SECOND_FORK, 5, target, draft)
    assert distance(distribution, joint_distribution(target, PROMPT, 5)) < 1e-12


@pytest.mark.parametrize("records", [False, True])
def test_joint_distribution_of_a_head_s_tree(records: bool) -> None:
    """Features are kept along the accepted path; with and without recorded steps."""
    target, prompt = FeatureTarget(TARGET.table), (0, 1, 2, 0)
    make = tree_maker(target, ToyHead(DRAFT), FORK, proposer=EagleProposer, records=records)
    assert distance(exact(make, FORK, prompt=prompt), joint_distribution(target, prompt, 3)) < 1e-12


def test_joint_distribution_under_processors() -> None:
    """Penalties count the tokens on the path to a node, not those on other branches."""
    params = SamplingParams(presence_penalty=math.log(2), frequency_penalty=math.log(2), top_k=2)
    distribution = exact(tree_maker(TARGET, DRAFT, FORK), FORK, 4, params=params)
    assert distance(distribution, processed_distribution(TARGET, params, PROMPT, 4)) < 1e-12


def test_joint_distribution_of_one_hot_trees() -> None:
    """Under top-k 1, draft and target are one-hot, and so is every further sibling: the draft's next choice."""
    rows, params = TARGET_DISTRIBUTIONS[[0, 1, 2]], SamplingParams(top_k=1)
    target, draft = MarkovModel(table(1, rows)), MarkovModel(table(2, rows))
    distribution = exact_distribution(
        tree_maker(target, draft, FORK), PROMPT, 5, (1, 1, 1), params, verify_tree, tree=FORK
    )
    assert distribution == joint_distribution(target, PROMPT, 5, partial(top_k_distribution, k=1))


# after 1 comes 0 or 2, after 2 comes 1 or 2: of two halves there is always one left
TURNS = Automaton([{0: 0, 1: 1, 2: 2}, {0: 0, 2: 2}, {1: 1, 2: 2}])


@pytest.mark.parametrize("tree", [FORK, SECOND_FORK], ids=lambda tree: str(tree.paths))
def test_joint_distribution_under_a_constraint(tree: Tree) -> None:
    """Each node has its own state, given by the path to it; siblings that are not allowed are rejected."""
    target, draft = (MarkovModel(table(seed, COINS[:3])) for seed in (1, 2))
    make = tree_maker(target, draft, tree)
    distribution = exact_distribution(make, PROMPT, 4, (2, 2, 2), rule=verify_tree, tree=tree, constraint=TURNS)
    truth = processed_distribution(target, SamplingParams(), PROMPT, 4, TURNS)
    assert distance(distribution, truth) < 1e-12
    assert distance(truth, joint_distribution(target, PROMPT, 4)) > 0.1


# two tokens that the target has more of than the draft: else a second sibling's own distribution decides nothing
FLAT_PAIR = tuple(MarkovModel((torch.tensor(row).double() / 8).expand(3, 3, 3)) for row in ([0, 5, 3], [5, 3, 0]))


def test_joint_distribution_where_later_siblings_matter_below_the_first_level() -> None:
    """The target has two tokens that the draft underestimates, so the second sibling's distribution matters."""
    distribution = exact(tree_maker(*FLAT_PAIR, LATE_FORK), LATE_FORK, 4, *FLAT_PAIR)
    assert distance(distribution, joint_distribution(FLAT_PAIR[0], PROMPT, 4)) < 1e-12


DEEP = Tree.balanced([2, 2, 2])
UNEVEN = [5, 4, 3]  # of 12
PAIRS_OF_SIBLINGS = {
    (a, b): UNEVEN[a] / 12 * UNEVEN[b] / (12 - UNEVEN[a]) for a, b in itertools.permutations(range(3), 2)
}
T1 = {  # name: the levels whose siblings are wrong
    None: set(),
    "T1 siblings with replacement": {1, 2, 3},
    "T1 late siblings with replacement": {2, 3},
}


@pytest.mark.parametrize("proposer", [DraftModelProposer, EagleProposer])
@pytest.mark.parametrize("mutant", T1)
def test_siblings_of_every_level_are_drawn_without_replacement(proposer: type, mutant: str | None) -> None:
    """Pairs as they are drawn: different, and the second from what the first left of the draft's distribution.

    Each of the seven families fails falsely with probability at most 1e-6.
    """
    rows, drafts = (torch.tensor(UNEVEN).double() / 12).expand(3, 3, 3), []
    target = FeatureTarget(rows)
    draft = ToyHead(target) if proposer is EagleProposer else target

    @Rule
    def recording(target, draft, *draws):
        drafts.append(draft)
        return verify_tree(target, draft, *draws)

    make = mutants.TREE_MUTANTS[mutant] if mutant else tree_maker
    decoder = make(target, draft, DEEP, proposer=proposer)(uniforms, recording, 1500)
    list(decoder.run([Request(i, PROMPT, SamplingParams(max_tokens=5, seed=i)) for i in range(1500)]))
    tokens = next(each for each in drafts if each.tree is not None).tokens
    wrong = set()
    for parent in DEEP.families:
        nodes = [node for node, each in enumerate(DEEP.parents) if each == parent]
        if not passes(map(tuple, tokens[:, nodes].tolist()), PAIRS_OF_SIBLINGS, 9):
            wrong.add(DEEP.depths[nodes[0]])
    assert wrong == T1[mutant]


# -- mutants -------------------------------------------------------------------------------------------------

SUPPORT = 9
SHARP = torch.tensor([[4, 0, 0], [0, 4, 0], [0, 0, 4], [3, 1, 0], [0, 3, 1], [1, 0, 3], [2, 1, 1]]).double() / 4
SHARP_PAIR = MarkovModel(table(6, SHARP)), MarkovModel(table(106, COINS))
# name: tree, pair, the greatest distance of two neighbouring tokens' distribution, by the enumeration of four tokens
MUTANTS = {
    "T1 siblings with replacement": (PAIR, FLAT_PAIR, 0.25),
    "T1 late siblings with replacement": (LATE_FORK, FLAT_PAIR, 0.09375),
    "T2 wrong parent row": (SECOND_FORK, SHARP_PAIR, 0.5),
    "T3 stale mask": (SECOND_FORK, SHARP_PAIR, 0.3125),
    "T4 compaction off by one": (SECOND_FORK, SHARP_PAIR, 0.125),
    "T4 no compaction": (SECOND_FORK, SHARP_PAIR, 0.125),
}


def num_draws_to_see(stated: float) -> int:
    """The fewest draws of which twice the radius is below a distance, and a few more."""
    return math.ceil(1.02 * (2 * radius(1, SUPPORT) / stated) ** 2)


def pairs_passing(make, distribution: dict, num_draws: int) -> list[bool]:
    """Whether each pair of neighbouring tokens passes the gate, on real random draws."""
    requests = [Request(i, PROMPT, SamplingParams(max_tokens=4, seed=i)) for i in range(num_draws)]
    outputs = [tuple(row.output) for row in make(uniforms, verify_tree, num_draws).run(requests)]
    return [
        passes([output[i : i + 2] for output in outputs], marginal(distribution, (i, i + 1)), SUPPORT) for i in range(3)
    ]


@pytest.mark.parametrize(("tree", "pair"), [(PAIR, FLAT_PAIR), (LATE_FORK, FLAT_PAIR), (SECOND_FORK, SHARP_PAIR)])
def test_gate_passes_real_trees(tree: Tree, pair: tuple[MarkovModel, MarkovModel]) -> None:
    """False-alarm probability at most 3e-6, for any seeds; as many draws as show each mutant of the tree."""
    num_draws = max(num_draws_to_see(stated) for other, _, stated in MUTANTS.values() if other == tree)
    assert pairs_passing(tree_maker(*pair, tree), joint_distribution(pair[0], PROMPT, 4), num_draws) == [True] * 3


@pytest.mark.parametrize("name", mutants.TREE_MUTANTS)
def test_a_tree_mutant_is_caught_exactly_and_by_the_gate(name: str) -> None:
    """The gate misses a mutant with probability at most 1e-6, as its distance exceeds twice the radius."""
    tree, pair, stated = MUTANTS[name]
    make, truth = mutants.TREE_MUTANTS[name](*pair, tree), joint_distribution(pair[0], PROMPT, 4)
    broken = exact(make, tree, 4, *pair)
    distances = [distance(marginal(broken, (i, i + 1)), marginal(truth, (i, i + 1))) for i in range(3)]
    assert max(distances) == pytest.approx(stated, abs=1e-9)
    num_draws = num_draws_to_see(stated)
    assert stated > 2 * radius(num_draws, SUPPORT), f"{num_draws} draws are too few to see it"
    assert not pairs_passing(make, truth, num_draws)[distances.index(max(distances))]


# -- invariants ----------------------------------------------------------------------------------------------

TREES = [Tree.chain(3), Tree.balanced([3, 2, 1]), Tree(((0,), (1,), (2,), (0, 0), (1, 0), (1, 1), (1, 1, 0)))]
PROMPTS = [[0, 1, 2, 0, 1], [2], [1, 1, 1, 1, 1, 1, 1, 2], [0, 2], [2, 0, 1]]
HEAD_TARGET, HEAD_DRAFT = FeatureTarget(TARGET.table), MarkovModel(table(9))
WIDE_PAIR = tuple(
    MarkovModel(
        table(seed, torch.rand(9, 5, generator=torch.Generator().manual_seed(seed)).double().add(0.1).softmax(-1))
    )
    for seed in (0, 1)
)


def decoder_for(proposer, tree: Tree | None, gamma: int = 3, rule=verify_tree, **options) -> Decoder:
    if proposer is EagleProposer:
        target, draft = FeatureTarget(WIDE_PAIR[0].table), ToyHead(WIDE_PAIR[1])
    else:
        target, draft = WIDE_PAIR
    return Decoder(target, proposer(draft, tree=tree), len(tree) if tree else gamma, rule=rule, **options)


def run(decoder: Decoder, params: list[SamplingParams], stop: frozenset[int] = frozenset()) -> list[Generation]:
    requests = [Request(i, tuple(PROMPTS[i % 5]), each, stop) for i, each in enumerate(params)]
    return sorted(decoder.run(requests), key=lambda row: row.request.index)


@pytest.mark.parametrize("proposer", [DraftModelProposer, EagleProposer])
@pytest.mark.parametrize("coupled", [False, True])
def test_a_tree_with_one_path_is_a_chain(proposer: type, coupled: bool) -> None:
    """Same uniforms, so same tokens and steps, at temperatures from 0 up, in ragged batches of three rows."""
    params = [SamplingParams(temperature=0.4 * (i % 4), max_tokens=4 + 2 * i, seed=i) for i in range(8)]
    rules = (verify_coupled, verify_coupled_tree) if coupled else (verify_tokens, verify_tree)
    chain = run(decoder_for(proposer, None, rule=rules[0], max_batch_size=3), params)
    tree = run(decoder_for(proposer, Tree.chain(3), rule=rules[1], max_batch_size=3), params)
    assert [row.output for row in tree] == [row.output for row in chain]
    assert [[replace(step, depth=None) for step in row.steps] for row in tree] == [row.steps for row in chain]


@pytest.mark.parametrize("proposer", [DraftModelProposer, EagleProposer])
@pytest.mark.parametrize("tree", TREES[1:], ids=len)
def test_a_row_in_any_batch_equals_the_row_alone(proposer: type, tree: Tree) -> None:
    """Requests of all kinds, more than there are slots; with recorded steps, too."""
    params = [
        SamplingParams(
            max_tokens=2 + 3 * i,
            seed=i,
            temperature=0.5 * i,
            frequency_penalty=0.2 * i,
            logit_bias={1: 0.3 * i},
            top_k=3 if i % 2 else 0,
        )
        for i in range(5)
    ]
    prompts = PROMPTS
    alone = []
    for i, each in enumerate(params):
        request = Request(i, tuple(prompts[i]), each)
        alone += list(decoder_for(proposer, tree).run([request]))
    for max_batch_size in (2, 5):
        for records in (False, True):
            together = run(decoder_for(proposer, tree, max_batch_size=max_batch_size, records=records), params)
            assert [row.output for row in together] == [row.output for row in alone]
            assert [row.steps for row in together] == [row.steps for row in alone]
    assert any(step.num_accepted > 1 for row in alone for step in row.steps)


@pytest.mark.parametrize("tree", TREES, ids=len)
def test_stop_tokens_max_tokens_and_counts(tree: Tree) -> None:
    """If the draft is the target, the first path is accepted, except for what truncation removes."""
    target, first_path = WIDE_PAIR[0], sum(set(path) == {0} for path in tree.paths)
    decoder = Decoder(target, DraftModelProposer(target, tree=tree), len(tree), max_batch_size=2, rule=verify_tree)
    params = [SamplingParams(max_tokens=1 + 3 * i, seed=i) for i in range(9)]
    for row, endless in zip(run(decoder, params, frozenset([4])), run(decoder, params), strict=True):
        assert row.output == endless.output[: len(row.output)]
        assert 4 not in row.output[:-1]
        assert row.output[-1] == 4 or len(row.output) == row.request.sampling.max_tokens
        assert len(row.output) == 1 + sum(step.num_accepted + (step.last is not None) for step in row.steps)
        for step in row.steps[:-1]:
            assert step == Step(len(tree), first_path, "bonus", tree.depth)
        if endless.steps:  # the last draft has as many levels as may still be emitted before the last token
            last = endless.steps[-1]
            assert last.num_accepted == min(last.depth or 0, first_path)
            assert last.num_drafted == tree.num_within(last.depth or 0)


@pytest.mark.parametrize("tree", TREES[1:], ids=len)
def test_the_draft_s_distributions_are_those_of_its_own_context(tree: Tree) -> None:
    """For a draft model with its own mask, in rows of unequal length; an error there would only cost speed."""
    torch.manual_seed(0)
    model = CausalLM(tiny.make("llama", tiny.GQA))
    seen = []

    @Rule
    def recording(target, draft, *draws):
        seen.append(draft)
        return verify_tree(target, draft, *draws)

    target = CausalLM(tiny.make("qwen2", tiny.GQA))
    proposer = DraftModelProposer(model, tree=tree)
    decoder = Decoder(target, proposer, len(tree), max_batch_size=2, rule=recording)
    prompts = [(5, 9, 8, 7), (3,)]
    params = SamplingParams(max_tokens=9)
    rows = list(decoder.run([Request(i, prompt, replace(params, seed=i)) for i, prompt in enumerate(prompts)]))
    rows = sorted(rows, key=lambda row: row.request.index)
    starts = [len(prompt) + 1 for prompt in prompts]
    drafts = [draft for draft in seen if draft.tree == tree]
    assert drafts
    for number, draft in enumerate(drafts):
        for index, row in enumerate(rows):
            for family, node in enumerate(tree.families):
                way = [int(draft.tokens[index, i]) for i in tree.lineage(node)]
                text = torch.tensor([[*row.tokens[: starts[index]], *way]])
                with torch.inference_mode():
                    distribution = model.model(input_ids=text, use_cache=False).logits[0, -1].softmax(-1)
                torch.testing.assert_close(
                    draft.distribution.dense()[index, family], distribution, rtol=1e-4, atol=1e-5
                )
            starts[index] += row.steps[number].num_accepted + 1
        if any(row.finish_reason and len(row.steps) <= number + 1 for row in rows):
            break


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_greedy_equals_a_full_forward_for_each_token(kind: str, max_batch_size: int) -> None:
    """Through transformers' own layers and through fused ones; trees of a head and of a draft model."""
    model = tiny.make(kind, tiny.SUPPORTED[kind])
    expected = [tiny.reference(model, prompt) for prompt in tiny.PROMPTS]
    draft = CausalLM(tiny.make(kind, tiny.SUPPORTED[kind]))
    for parameter in draft.model.parameters():  # mostly of the target's mind
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    drafters = [(DraftModelProposer, draft)]
    if kind == "llama":
        drafters.append((EagleProposer, new_head(model, torch.arange(0, 61, 2)).eval()))
    for is_fused in (False, True):
        if is_fused:
            fuse(model)
        target, num_accepted = CausalLM(model), 0
        for (proposer, drafter), tree in itertools.product(drafters, TREES[1:]):
            options = {"max_batch_size": max_batch_size, "rule": verify_tree}
            decoder = Decoder(target, proposer(drafter, tree=tree), len(tree), **options)
            requests = [Request(i, tuple(prompt), tiny.GREEDY) for i, prompt in enumerate(tiny.PROMPTS)]
            rows = sorted(decoder.run(requests), key=lambda row: row.request.index)
            assert [row.output for row in rows] == expected
            num_accepted += sum(step.num_accepted for row in rows for step in row.steps)
        assert num_accepted > 10


def test_logprobs_are_the_target_s_along_the_path() -> None:
    tree = TREES[2]
    params = [SamplingParams(max_tokens=12, seed=i, logprobs=True) for i in range(5)]
    for row in run(decoder_for(DraftModelProposer, tree, max_batch_size=2), params):
        text = [0, *row.tokens]
        logs = [float(WIDE_PAIR[0].table[text[i - 2], text[i - 1], text[i]].log()) for i in range(2, len(text))]
        assert row.logprobs == pytest.approx(logs[-12:])


def test_invalid_logits_are_reported_with_their_level() -> None:
    """Two levels down, on the second branch."""
    table = WIDE_PAIR[0].table.clone()
    target, tree = MarkovModel(table), Tree(((0,), (1,), (1, 0)))
    decoder = Decoder(target, DraftModelProposer(WIDE_PAIR[1], tree=tree), 3, rule=verify_tree)
    logits_of = target.forward

    def spoilt(tokens, cache, *args, **options):
        logits = logits_of(tokens, cache, *args, **options)
        if tokens.shape[1] == 4:
            logits[0, 3] = torch.nan
        return logits

    target.forward = spoilt
    with pytest.raises(NonFiniteLogitsError, match=r"the target's request 0 at token position 5 \(decode step 1\)"):
        list(decoder.run([Request(0, (1, 2), SamplingParams(max_tokens=9))]))


# -- bit-identical to plain decoding -------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    not cpp.available(torch.bfloat16), reason="kernels need Linux, a C++ compiler and AVX512-BF16"
)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
def test_with_kernels_a_node_is_bit_identical_to_plain_decoding(head_dim: int, dtype: torch.dtype) -> None:
    """Every node of a tree after texts of unequal length; then the kept path and the tokens after it."""
    options = tiny.GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": head_dim}
    model = tiny.make("llama", options | {"max_position_embeddings": 128}, dtype)
    fuse(model)
    lm, generator = CausalLM(model), torch.Generator().manual_seed(1)
    tree, texts = Tree.balanced([3, 2, 2, 1, 1]), [torch.randint(3, 61, (1, n), generator=generator) for n in (40, 15)]
    nodes = torch.randint(3, 61, (2, len(tree)), generator=generator)
    cache = lm.allocate(2, 45 + len(tree), features=(FINAL,))
    for slot, text in enumerate(texts):
        cache.num_cached[slot] = 0
        lm.forward(text[:, :-1], cache, slot)
    cache.num_cached[:] = [text.shape[1] - 1 for text in texts]
    columns = torch.cat([torch.cat([text[:, -1:] for text in texts]), nodes], 1)
    logits = lm.forward(columns, cache, branches=Branches.after_root(tree.parents))
    for slot, node in itertools.product(range(2), range(len(tree))):
        way = tree.lineage(node)
        alone = lm.forward(torch.cat([texts[slot], nodes[slot, way].unsqueeze(0)], 1), lm.allocate(1, 60))[0]
        assert torch.equal(logits[slot, [0, *(i + 1 for i in way)]], alone[-len(way) - 1 :])
    ends = [tree.paths.index(path) for path in ((2, 1, 0, 0, 0), (1, 0, 1, 0, 0))]
    path = torch.tensor([tree.lineage(end) for end in ends])
    cache.keep(torch.tensor([text.shape[1] for text in texts]), path)
    cache.num_cached[:] = [text.shape[1] + tree.depth for text in texts]
    more = torch.randint(3, 61, (2, 3), generator=generator)
    behind = lm.forward(more, cache)
    for slot, text in enumerate(texts):
        whole, plain = (
            torch.cat([text, nodes[slot : slot + 1, path[slot]], more[slot : slot + 1]], 1),
            lm.allocate(1, 60, features=(FINAL,)),
        )
        assert torch.equal(behind[slot], lm.forward(whole, plain)[0, -3:])
        assert torch.equal(cache.features[slot, : whole.shape[1]], plain.features[0, : whole.shape[1]])


@pytest.mark.parametrize("has_kernels", [False, pytest.param(True, marks=needs_kernels)])
def test_entries_are_moved_to_where_a_chain_has_them(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_kernels:
        monkeypatch.setattr(cpp, "supports", lambda tensor: False)
    cache = CausalLM(tiny.make("llama", tiny.GQA)).allocate(3, 20, features=(FINAL,))
    cache.open(0, 3, 1, torch.device("cpu"))
    for index in range(2):
        keys, values = cache.blocks(index, 2, 8, torch.float32)
        keys.copy_(torch.randn(keys.shape)), values.copy_(torch.randn(values.shape))
    cache.features.copy_(torch.randn(cache.features.shape))
    blocks = [block for layer in cache.layers for block in (layer.keys, layer.values)]
    before, features = [block.clone() for block in blocks], cache.features.clone()
    cache.keep(torch.tensor([5, 0]), torch.tensor([[1, 4, 6], [0, 1, 2]]))
    moved = list(range(20))
    moved[5:8] = [6, 9, 11]
    for block, old in zip([*blocks, cache.features.unsqueeze(1)], [*before, features.unsqueeze(1)], strict=True):
        assert torch.equal(block[0], old[0][:, moved])
        assert torch.equal(block[1:], old[1:])
