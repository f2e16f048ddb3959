"""Token trees: their shapes, their verification rule (exactly), and the optimal tree against brute force."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers.strategies import distribution_rows, distributions
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.conformance.enumeration import pieces_between
from specdec.proposers.tree import draw_siblings
from specdec.sampling.distributions import Dense, OneHot, Partial
from specdec.trees import verification
from specdec.trees.columns import Branches, offsets, tree_paths, visible
from specdec.trees.optimal import expected_accepted, optimal_tree, optimal_trees
from specdec.trees.shape import Tree, as_tree
from specdec.trees.verification import sibling_distribution, verify_coupled_tree, verify_tree, without
from specdec.verification import Draft, verify_coupled, verify_tokens

# -- shapes --------------------------------------------------------------------------------------------------

BUSHY = [(1,), (0,), (0, 1), (0, 0), (1, 0), (0, 1, 0)]


def test_a_tree_from_rank_paths() -> None:
    tree = Tree(tuple(BUSHY))
    assert tree.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0))
    assert tree.parents == (-1, -1, 0, 0, 1, 3)
    assert tree.families == (-1, 0, 1, 3)
    assert tree.widths == (2, 3, 1)
    assert (len(tree), tree.depth, tree.depths, tree.ranks) == (6, 3, (1, 1, 2, 2, 2, 3), (0, 1, 0, 1, 0, 0))
    assert tree.ancestors.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 1, 0, 0, 1, 0],
        [1, 0, 0, 1, 0, 1],
    ]
    assert tree.lineage(5) == [0, 3, 5]
    assert [tree.num_within(depth) for depth in range(-1, 5)] == [0, 0, 2, 5, 6, 6]
    assert tree.cut(2) == Tree(tuple(BUSHY[:5]))
    assert tree.cut(7) is tree


def test_chains_and_balanced_trees() -> None:
    assert Tree.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert Tree.balanced([2, 1, 2]).widths == (2, 2, 4)
    assert len(Tree.balanced([8, 7, 8])) == 512
    assert Tree.chain(24).depth == 24


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1, 0)], r"tree path \(1, 0\) must have its parent \(1,\) in the tree; add it"),
        ([(0,), (0,)], r"tree path \(0,\) must occur only once"),
        ([(0,), (2,)], r"tree path \(2,\) must have its lower rank \(1,\) in the tree; add it"),
        ([(0,), (0, 1)], r"tree path \(0, 1\) must have its lower rank \(0, 0\) in the tree; add it"),
        ([()], r"tree path \(\) must have a rank; the root is the text"),
        ([(-1,)], r"tree path \(-1,\) must consist of ranks >= 0"),
        ([(0.5,)], r"tree path \(0.5,\) must consist of ranks >= 0"),
        ([], "tree of 0 nodes must have 1 to 512 nodes"),
        ([(i,) for i in range(513)], "tree of 513 nodes must have 1 to 512 nodes"),
        ([(0,) * i for i in range(1, 26)], "tree of 25 levels must have at most 24 levels"),
    ],
)
def test_invalid_trees_are_rejected(paths: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tree(tuple(paths))


def test_invalid_balanced_trees_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"widths=\[2, 0\] must be at least 1 on each level"):
        Tree.balanced([2, 0])
    with pytest.raises(ValueError, match=r"widths=\[30, 30\] must give at most 512 nodes; make levels narrower"):
        Tree.balanced([30, 30])


def test_a_tree_is_saved_and_loaded(tmp_path: Path) -> None:
    tree, path = Tree(tuple(BUSHY)), tmp_path / "tree.json"
    tree.save(path, pair="a pair")
    assert Tree.load(path) == as_tree(str(path)) == as_tree(BUSHY) == as_tree(tree) == tree
    path.write_text("[[0], [0, 0]]")
    assert as_tree(path) == Tree.chain(2)


@pytest.mark.parametrize("text", ["{}", "not JSON", "[0, 1]", "3"])
def test_a_file_without_a_tree_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(text)
    with pytest.raises(ValueError, match=r"tree='.*tree.json' must be a JSON file of rank paths"):
        Tree.load(tmp_path / "tree.json")
    with pytest.raises(ValueError, match=r"tree='.*none.json' must be a JSON file"):
        Tree.load(tmp_path / "none.json")


def trees(most_nodes: int = 6, most_depth: int = 3) -> st.SearchStrategy[Tree]:
    """Each node is the next child of one of the nodes before, or of the root."""
    choices = st.lists(st.integers(0, 10), min_size=1, max_size=most_nodes)

    def grow(numbers: list[int]) -> Tree:
        paths: list[tuple[int, ...]] = []
        for number in numbers:
            parents = [(), *(path for path in paths if len(path) < most_depth)]
            parent = parents[number % len(parents)]
            paths.append((*parent, sum(path[:-1] == parent for path in paths)))
        return Tree(tuple(paths))

    return choices.map(grow)


@given(trees(12, 5), st.integers(0, 12))
def test_the_columns_of_a_tree_see_their_ancestors(tree: Tree, first: int) -> None:
    """In one call with the root, and in a later call that feeds only the nodes from some number on."""
    device, number = torch.device("cpu"), min(first, len(tree) - 1)
    branches = Branches.after_root(tree.parents)
    assert branches.width == len(tree) + 1
    assert offsets(branches, device).tolist() == [0, *tree.depths]
    assert torch.equal(visible(branches, device)[1:, 1:], tree.ancestors)
    assert visible(branches, device)[:, 0].all()
    later = Branches(tree.parents, number)
    assert offsets(later, device).tolist() == [depth - 1 for depth in tree.depths[number:]]
    assert torch.equal(visible(later, device), tree.ancestors[number:])
    for node, path in zip(range(number, len(tree)), tree_paths(later, device).tolist(), strict=True):
        assert path[: tree.depths[node]] == tree.lineage(node)


# -- the rule: its distribution, exactly ------------------------------------------------------------------------------

VOCAB = 3


def distribution_at(table: torch.Tensor, prefix: Sequence[int]) -> torch.Tensor:
    """A distribution that depends on how many tokens came before and on the last one."""
    return table[(3 * len(prefix) + (prefix[-1] if prefix else 0)) % len(table)]


def drafts(tree: Tree, table: torch.Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every draft with its probability, by the definition: siblings without replacement, then in order of number."""

    def extend(tokens: tuple[int, ...], probability: float) -> Iterator[tuple[tuple[int, ...], float]]:
        node = len(tokens)
        if node == len(tree):
            yield tokens, probability
            return
        distribution = sequential(tree, table, tokens, node)
        for token, share in enumerate(distribution):
            if share:
                yield from extend((*tokens, token), probability * share)

    yield from extend((), 1.0)


def prefix_of(tree: Tree, tokens: Sequence[int], node: int) -> tuple[int, ...]:
    return tuple(tokens[i] for i in tree.lineage(node))


def sequential(tree: Tree, table: torch.Tensor, tokens: Sequence[int], node: int) -> list[float]:
    """The distribution of a node's token given all nodes before it; the lowest token left, where no mass is."""
    distribution = distribution_at(table, prefix_of(tree, tokens, tree.parents[node])).tolist()
    taken = [tokens[i] for i in range(node) if tree.parents[i] == tree.parents[node]]
    rest = [0.0 if token in taken else p for token, p in enumerate(distribution)]
    if sum(rest) == 0:
        lowest = min(set(range(len(distribution))) - set(taken))
        return [float(token == lowest) for token in range(len(distribution))]
    return [p / sum(rest) for p in rest]


def outcomes(tree: Tree, target: torch.Tensor, table: torch.Tensor, tokens: tuple) -> Iterator[tuple]:
    """Uniforms that stand for all, with their weight: thresholds of each node's test, and of the last token."""
    thresholds, lasts = [], set()
    residuals: dict[int, list[float]] = {}
    for node in range(len(tree)):
        parent = tree.parents[node]
        p = residuals.setdefault(parent, distribution_at(target, prefix_of(tree, tokens, parent)).tolist())
        q = sequential(tree, table, tokens, node)
        thresholds.append(pieces_between([p[tokens[node]] / q[tokens[node]]]))
        lasts.update(itertools.accumulate(p))
        excess = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        residuals[parent] = [x / sum(excess) for x in excess] if sum(excess) > 1e-12 else p
    for node in range(-1, len(tree)):
        distribution = residuals.get(node) or distribution_at(target, prefix_of(tree, tokens, node)).tolist()
        lasts.update(itertools.accumulate(distribution))
    for *accepts, last in itertools.product(*thresholds, pieces_between(lasts)):
        yield [u for u, _ in accepts], last[0], math.prod(w for _, w in [*accepts, last])


def emitted_distribution(tree: Tree, target: torch.Tensor, table: torch.Tensor, rule=verify_tree) -> Counter:
    """The distribution of tree.depth + 1 tokens that begin with what the rule emits and go on by the target."""
    rows, weights = [], []
    for tokens, probability in drafts(tree, table):
        columns = [distribution_at(target, prefix_of(tree, tokens, node)) for node in range(-1, len(tree))]
        families = [distribution_at(table, prefix_of(tree, tokens, node)) for node in tree.families]
        for accepts, last, weight in outcomes(tree, target, table, tokens):
            rows.append((torch.stack(columns), torch.stack(families), tokens, accepts, last))
            weights.append(probability * weight)
    columns, families, tokens, accepts, lasts = zip(*rows, strict=True)
    num_rows = len(rows)
    draft = Draft(torch.tensor(tokens), torch.full((num_rows,), len(tree)), Dense(torch.stack(families)), tree=tree)
    final = torch.tensor(lasts, dtype=torch.float64).unsqueeze(1).expand(-1, tree.depth + 1)
    outcome = rule(Dense(torch.stack(columns)), draft, torch.tensor(accepts, dtype=torch.float64), final)
    distribution: Counter = Counter()
    for number, weight in enumerate(weights):
        path = outcome.path[number, : outcome.accepted[number]].tolist()
        emitted = (*(tokens[number][node] for node in path), int(outcome.next_token[number]))
        for rest in itertools.product(range(VOCAB), repeat=tree.depth + 1 - len(emitted)):
            text = (*emitted, *rest)
            distribution[text] += weight * math.prod(
                float(distribution_at(target, text[:i])[text[i]]) for i in range(len(emitted), len(text))
            )
    return distribution


def target_distribution(tree: Tree, target: torch.Tensor) -> dict:
    texts = itertools.product(range(VOCAB), repeat=tree.depth + 1)
    return {
        text: math.prod(float(distribution_at(target, text[:i])[token]) for i, token in enumerate(text))
        for text in texts
    }


def total_variation(first: dict, second: dict) -> float:
    return 0.5 * sum(abs(first.get(x, 0) - second.get(x, 0)) for x in first.keys() | second.keys())


@settings(max_examples=40, deadline=None)
@given(
    trees(4, 2).filter(lambda tree: max(tree.ranks) < VOCAB), distribution_rows(7, VOCAB), distribution_rows(5, VOCAB)
)
def test_the_rule_has_the_target_s_distribution(tree: Tree, target: torch.Tensor, table: torch.Tensor) -> None:
    """Any tree, any distributions, zeros and equal ones among them: every draft and every uniform, added up."""
    assert total_variation(emitted_distribution(tree, target, table), target_distribution(tree, target)) < 1e-12


def test_the_sum_sees_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions of another parent's row, and siblings tested as if drawn with replacement."""
    tree = Tree(((0,), (1,), (0, 0)))
    target = torch.tensor([[0.2, 0.45, 0.35], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]], dtype=torch.float64)
    table = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64)
    truth = target_distribution(tree, target)
    assert total_variation(emitted_distribution(tree, target, table), truth) < 1e-12

    def shifted(target, draft, *uniforms):
        return verify_tree(Dense(target.probs.roll(1, 1)), draft, *uniforms)

    assert total_variation(emitted_distribution(tree, target, table, shifted), truth) > 0.05
    monkeypatch.setattr(verification, "sibling_distribution", lambda distribution, taken, tokens: distribution)
    assert total_variation(emitted_distribution(tree, target, table), truth) > 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.data())
def test_a_chain_gives_exactly_what_verify_tokens_gives(num_tokens: int, data: st.DataObject) -> None:
    """Bit for bit, in float32 too, rows of all lengths."""
    batch, generator = 5, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    target = torch.stack([data.draw(distribution_rows(num_tokens + 1)) for _ in range(batch)]).to(dtype)
    distribution = torch.stack([data.draw(distribution_rows(num_tokens)) for _ in range(batch)]).to(dtype)
    tokens = torch.randint(4, (batch, num_tokens), generator=generator)
    lengths = torch.randint(num_tokens + 1, (batch,), generator=generator)
    uniforms = [torch.rand(batch, num_tokens + i, dtype=torch.float64, generator=generator) for i in (0, 1)]
    kinds = [Dense(distribution), OneHot(tokens, 4), Partial(Dense(distribution), torch.arange(4), 4)]
    for draft_distribution in kinds:
        for target_distribution in (Dense(target), OneHot(target.argmax(-1), 4)):
            chain = verify_tokens(target_distribution, Draft(tokens, lengths, draft_distribution), *uniforms)
            tree = verify_tree(
                target_distribution,
                Draft(tokens, lengths, draft_distribution, Tree.chain(num_tokens)),
                *uniforms,
            )
            assert torch.equal(chain.accepted, tree.accepted)
            assert torch.equal(chain.next_token, tree.next_token)
            assert torch.equal(tree.path, torch.arange(num_tokens).expand(batch, -1))


@pytest.mark.parametrize("vocabulary", [None, torch.tensor([1, 4, 5, 9, 11])])
@pytest.mark.parametrize("place", range(5))
def test_greedy_siblings_are_the_distribution_s_token_and_the_largest_others(
    vocabulary: torch.Tensor | None, place: int
) -> None:
    """Also where a bias chose the first, whatever its logit; ties of forbidden tokens give different ones."""
    logits = torch.tensor([[[0.5, 2.0, -torch.inf, 1.0, -torch.inf]]])
    names = list(range(5)) if vocabulary is None else vocabulary.tolist()
    distribution = OneHot(torch.tensor([[names[place]]]), 12)
    drawn = draw_siblings(distribution, logits, [4], torch.zeros(1, 4, dtype=torch.float64), vocabulary)[0].tolist()
    others = [names[each] for each in (1, 3, 0) if each != place]
    assert drawn[: 1 + len(others)] == [names[place], *others][:4]
    assert len({*drawn}) == 4


@settings(max_examples=60, deadline=None)
@given(trees(8, 4), st.data())
def test_a_target_without_doubt_is_followed(tree: Tree, data: st.DataObject) -> None:
    """The one-hot shortcut and the walk over dense distributions agree, in rows that propose only some levels."""
    batch, generator = 6, torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    says = torch.randint(4, (batch, len(tree) + 1), generator=generator)
    tokens = torch.tensor(tree.ranks).add(torch.randint(4, (batch, 1), generator=generator)) % 13
    depths = torch.randint(tree.depth + 1, (batch,), generator=generator).tolist()
    lengths = torch.tensor([tree.num_within(depth) for depth in depths])
    distribution = OneHot(torch.zeros(batch, len(tree.families), dtype=torch.int64), 13)
    draft = Draft(tokens, lengths, distribution, tree)
    uniforms = [torch.rand(batch, n, dtype=torch.float64, generator=generator) for n in (len(tree), tree.depth + 1)]
    short = verify_tree(OneHot(says, 13), draft, *uniforms)
    walked = verify_tree(Dense(OneHot(says, 13).dense().double()), draft, *uniforms)
    for name in ("accepted", "next_token", "path"):
        assert torch.equal(getattr(short, name), getattr(walked, name))
    assert (short.accepted <= torch.tensor(depths)).all()


def test_coupled_verification_follows_the_target_s_own_draws() -> None:
    """What is emitted is the target's draw at each position, and for a chain what `verify_coupled` gives."""
    generator = torch.Generator().manual_seed(1)
    target = Dense(torch.rand(8, 4, 5, generator=generator).double().softmax(-1))
    noise = torch.rand(8, 4, 5, dtype=torch.float64, generator=generator)
    tokens = torch.randint(5, (8, 3), generator=generator)
    distribution, lengths = OneHot(tokens, 5), torch.tensor([3, 3, 3, 3, 2, 1, 0, 3])
    chain = verify_coupled(target, Draft(tokens, lengths, distribution), noise[:, :3, 0], noise)
    tree = verify_coupled_tree(target, Draft(tokens, lengths, distribution, Tree.chain(3)), noise[:, :3, 0], noise)
    assert torch.equal(chain.accepted, tree.accepted)
    assert torch.equal(chain.next_token, tree.next_token)


@pytest.mark.parametrize("rule", [verify_tree, verify_coupled_tree])
def test_rows_take_different_branches(rule) -> None:
    """Two rows of a lopsided tree, whose targets leave no doubt: one takes nodes 0 and 3, its second child, the other
    nodes 1 and 4, an only child and the last node, while the first row still tries a second one.
    """
    tree = Tree(((0,), (1,), (0, 0), (0, 1), (1, 0)))
    tokens = torch.tensor([[0, 1, 0, 1, 2]] * 2)
    says = torch.tensor([[0, 1, 0, 0, 2, 0], [1, 0, 2, 0, 0, 0]])  # after the text and after each node
    draft = Draft(tokens, torch.tensor([5, 5]), Dense(torch.full((2, 3, 3), 1 / 3, dtype=torch.float64)), tree)
    noise = torch.full((2, 3, 3), 0.5, dtype=torch.float64)
    final = noise if rule.needs_noise else noise[..., 0]
    outcome = rule(Dense(OneHot(says, 3).dense().double()), draft, torch.full((2, 5), 0.5, dtype=torch.float64), final)
    assert outcome.accepted.tolist() == [2, 2]
    assert outcome.path.tolist() == [[0, 3], [1, 4]]
    assert outcome.next_token.tolist() == [2, 0]


def test_a_chain_without_a_tree_is_verified_as_a_chain() -> None:
    target = Dense(OneHot(torch.tensor([[1, 2, 0]]), 3).dense().double())
    draft = Draft.deterministic(torch.tensor([[1, 0]]), torch.tensor([2]), 3)
    noise = torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    for outcome in (
        verify_tree(target, draft, noise[:, :2, 0], noise[..., 0]),
        verify_coupled_tree(target, draft, noise[:, :2, 0], noise),
    ):
        assert (outcome.accepted.tolist(), outcome.next_token.tolist(), outcome.path) == ([1], [2], None)


def test_what_the_rules_for_trees_need() -> None:
    assert (verify_tree.needs_noise, verify_tree.always_draws) == (False, False)
    assert (verify_coupled_tree.needs_noise, verify_coupled_tree.always_draws) == (True, False)


def test_the_tensors_of_a_tree_are_kept() -> None:
    """A captured CUDA graph holds pointers to them."""
    tree, device = Tree.balanced([2, 1]), torch.device("cpu")
    assert verification._layout(tree, device) is verification._layout(tree, device)


def test_only_a_cpu_s_mask_is_read() -> None:
    """Reading one of another device synchronizes; a meta tensor raises if it is read."""
    masks = [torch.zeros(2, dtype=torch.bool), torch.tensor([False, True])]
    assert [verification._surely_none(mask) for mask in masks] == [True, False]
    assert not verification._surely_none(masks[0].to("meta"))


# -- the distribution of a sibling ------------------------------------------------------------------------------------


@given(distributions(5), st.permutations(range(5)), st.integers(0, 4))
def test_a_sibling_s_distribution_is_the_family_s_without_those_before(
    distribution: torch.Tensor, order: list, rank: int
) -> None:
    """In every form of a distribution; where none is left it is certain."""
    taken, token = torch.tensor(order[:rank], dtype=torch.int64), torch.tensor(order[rank])
    rest = [0.0 if i in order[:rank] else float(p) for i, p in enumerate(distribution)]
    expected = [p / sum(rest) for p in rest] if sum(rest) else [float(i == order[rank]) for i in range(5)]
    places = torch.tensor([1, 3, 4, 6, 9])
    partial = sibling_distribution(Partial(Dense(distribution), places, 10), places[taken], places[token])
    assert partial.dense()[places].tolist() == pytest.approx(expected, abs=1e-15)
    assert sibling_distribution(Dense(distribution), taken, token).dense().tolist() == pytest.approx(
        expected, abs=1e-15
    )
    assert float(without(Dense(distribution), taken)[1]) == pytest.approx(sum(rest), abs=1e-15)
    one_hot = sibling_distribution(OneHot(torch.tensor(order[0]), 5), taken, token)
    assert int(one_hot.tokens) == order[rank]
    inner, mass = without(Partial(Dense(distribution), places, 10), places[taken])
    assert inner.dense()[places].tolist() == [
        0.0 if i in order[:rank] else float(p) for i, p in enumerate(distribution)
    ]
    assert float(mass) == pytest.approx(sum(rest), abs=1e-15)


@pytest.mark.parametrize("token", [0, 1, 2])
def test_a_certain_token_is_left_until_it_is_taken(token: int) -> None:
    """Whatever the other ones are: below it, above it, both."""
    certain, others = OneHot(torch.tensor([token]), 3), [each for each in range(3) if each != token]
    for taken in (others[:1], others[1:], others):
        assert without(certain, torch.tensor([taken]))[1].tolist() == [[1.0]]
        assert sibling_distribution(certain, torch.tensor([taken]), torch.tensor([others[0]])).tokens.tolist() == [
            token
        ]
    assert without(certain, torch.tensor([[token]]))[1].tolist() == [[0.0]]


def test_the_first_sibling_has_the_family_s_distribution() -> None:
    """As it is, not normalized once more."""
    none, token = torch.empty(2, 0, dtype=torch.int64), torch.tensor([0, 1])
    dense = Dense(torch.tensor([[0.1, 0.2, 0.7]] * 2))
    for distribution in (dense, OneHot(token, 3), Partial(dense, torch.tensor([1, 3, 4]), 6)):
        assert sibling_distribution(distribution, none, token) is distribution


def test_padding_may_lie_beyond_a_partial_vocabulary() -> None:
    partial = Partial(Dense(torch.tensor([[0.5, 0.5]])), torch.tensor([1, 3]), 9)
    found = sibling_distribution(partial, torch.tensor([[1]]), torch.tensor([8]))
    assert found.dense().tolist() == [[0, 0, 0, 1, 0, 0, 0, 0, 0]]


# -- the best tree -------------------------------------------------------------------------------------------


def all_trees(num_nodes: int, depth: int, ranks: int) -> Iterator[Tree]:
    """Every tree of `num_nodes` nodes, built by adding a node at a time."""
    known = {frozenset()}
    for _ in range(num_nodes):
        known = {
            paths | {(*parent, rank)}
            for paths in known
            for parent in [(), *paths]
            if len(parent) < depth
            for rank in [sum(path[:-1] == parent for path in paths)]
            if rank < ranks
        }
    return (Tree(tuple(paths)) for paths in known)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(1, 6))
def test_no_tree_is_better_than_the_optimal_one(weights: list, num_nodes: int) -> None:
    """Against every tree of up to that many nodes; acceptance need not fall with the rank."""
    weights[0][0] += 1
    acceptance = [[each / 28 for each in level] for level in weights]
    best = optimal_tree(acceptance, num_nodes)
    assert len(best) <= num_nodes
    others = (tree for size in range(1, num_nodes + 1) for tree in all_trees(size, len(acceptance), 3))
    assert expected_accepted(best, acceptance) == pytest.approx(
        max(expected_accepted(tree, acceptance) for tree in others), abs=1e-12
    )


def test_optimal_trees_of_every_size() -> None:
    """A dominant first rank gives a chain, equal ranks give a bush, and more nodes never lower the expectation."""
    assert optimal_tree([[0.9, 0.01]] * 6, 6) == Tree.chain(6)
    assert optimal_tree([[0.3, 0.3, 0.3]] * 6, 3) == Tree.balanced([3])
    grown = optimal_trees([[0.5, 0.2, 0.1]] * 24, 512)
    assert [len(tree) for tree in grown] == list(range(1, 513))
    values = [expected_accepted(tree, [[0.5, 0.2, 0.1]] * 24) for tree in grown[::50]]
    assert values == sorted(values)
    assert len(optimal_trees([[0.5, 0.2]], 9)) == 2  # there are no more nodes


@pytest.mark.parametrize(
    ("acceptance", "num_nodes", "message"),
    [
        ([[0.5]], 0, r"num_nodes=0 must lie in \[1, 512\]"),
        ([[0.5]], 513, r"num_nodes=513 must lie in \[1, 512\]"),
        ([], 1, "acceptance of 0 levels must have 1 to 24"),
        ([[0.5]] * 25, 1, "acceptance of 25 levels must have 1 to 24"),
        ([[0.9, 0.2]], 1, r"acceptance\[0\]=\[0.9, 0.2\] must be probabilities that sum to at most 1"),
        ([[-0.1]], 1, r"acceptance\[0\]=\[-0.1\] must be probabilities"),
        ([[0.0, 0.5]], 1, r"acceptance\[0\]\[0\] must be above 0"),
    ],
)
def test_invalid_acceptance_rates_are_rejected(acceptance: list, num_nodes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimal_tree(acceptance, num_nodes)
