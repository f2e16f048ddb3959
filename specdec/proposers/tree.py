"""Draws a token tree level by level: the children of a node without replacement from its distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Distribution, OneHot, largest, stack_distributions
from specdec.sampling.randomness import Role, UniformSource, noise, on_branch
from specdec.sampling.state import RowParams
from specdec.trees.columns import Branches
from specdec.trees.shape import Tree
from specdec.trees.verification import without
from specdec.verification import Draft

LogitsAt = Callable[["Level", Tensor], Tensor]
DistributionOf = Callable[[Tensor, Tensor, "Level"], tuple[Distribution, Tensor]]


class Level:
    """A level of a tree, by its parents, with indices on a device.

    number: 0 for the children of the root. start: its first node. parents: nodes with children in the level, int64 [n];
    -1 is the root. counts: number of children of each. above: int64 [n], for each parent the index of its own parent
    among the parents of the previous level. lineage: the nodes on the path to each parent. branches: the parents among
    all nodes with children except the root, which are the input of a draft model.
    """

    def __init__(self, tree: Tree, number: int, device: torch.device) -> None:
        last = tree.num_within(number)
        parents, before = _parents_of_level(tree, number), _parents_of_level(tree, number - 1)
        self.number, self.start = number, last
        self.counts = tuple(tree.num_children(node) for node in parents)
        self.lineage = [tree.lineage(node) for node in parents]
        above = [before.index(tree.parents[node]) for node in parents if number]
        self.parents, self.above = (torch.tensor(nodes, dtype=torch.int64, device=device) for nodes in (parents, above))
        fed = [node for node in tree.families if node >= 0]  # leaves need no distribution
        numbers = {-1: -1} | {node: place for place, node in enumerate(fed)}
        known = [node for node in fed if node < last]
        self.branches = Branches(
            tuple(numbers[tree.parents[node]] for node in known), len(known) - (len(parents) if number else 0)
        )


def _parents_of_level(tree: Tree, number: int) -> list[int]:
    first, last = tree.num_within(number - 1), tree.num_within(number)
    return [-1] if number == 0 else [node for node in range(first, last) if node in tree.families]


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def levels_of(tree: Tree, device: torch.device) -> list[Level]:
    """All levels of a tree, the children of the root first."""
    return [Level(tree, number, device) for number in range(tree.depth)]


def draw_tree(
    batch: Batch,
    limits: Sequence[int],
    tree: Tree,
    logits_at: LogitsAt,
    uniforms: UniformSource,
    vocabulary: Tensor | None = None,
) -> Draft:
    """A draft of the tree's first limits[r] levels for row r, drawn with the rows' own sampling parameters.

    logits_at: (level, tokens of its parents int64 [rows, parents], empty for the root) -> logits of their children,
    [rows, parents, vocab]. vocabulary: int64, ascending, the tokens of the logits' columns, or None for all.
    """
    device = batch.sampling.device
    if not (batch.recorder and batch.recorder.records):  # recorded drafts all have the same shape
        tree = tree.cut(max(limits))

    def distribution_of(logits: Tensor, tokens: Tensor, level: Level) -> tuple[Distribution, Tensor]:
        return batch.sampling.distribution(logits, tokens, vocabulary, level.lineage, of_draft=True)

    draws = tree_uniforms(batch.sampling.rows, upload(batch.num_tokens(), device), tree, uniforms)
    tokens, distribution, finite = _draw(tree, draws, logits_at, distribution_of, vocabulary)
    return Draft(tokens, upload([tree.num_within(limit) for limit in limits], device), distribution, tree, finite)


def draw_fixed_tree(
    rows: RowParams,
    origins: Tensor,
    tree: Tree,
    logits_at: LogitsAt,
    uniforms: UniformSource,
    vocabulary: Tensor | None = None,
) -> tuple[Tensor, Distribution, Tensor]:
    """`draw_tree` as a pure function of tensors, which can be recorded: all rows draft the whole tree.

    origins: int64 [rows], positions of the drafts.
    Returns tokens int64 [rows, nodes], the distributions of the families of siblings [rows, families], and whether
    these are valid, bool [rows, families].
    """

    def distribution_of(logits: Tensor, tokens: Tensor, level: Level) -> tuple[Distribution, Tensor]:
        return rows.distribution(logits, vocabulary, of_draft=True)

    return _draw(tree, tree_uniforms(rows, origins, tree, uniforms), logits_at, distribution_of, vocabulary)


def _draw(
    tree: Tree, draws: Tensor, logits_at: LogitsAt, distribution_of: DistributionOf, vocabulary: Tensor | None
) -> tuple[Tensor, Distribution, Tensor]:
    """Draw a tree level by level. draws: from `tree_uniforms`. distribution_of: maps logits, drafted tokens and level
    to the distributions of the level's families."""
    tokens = torch.empty(len(draws), 0, dtype=torch.int64, device=draws.device)
    distributions: list[Distribution] = []
    finite: list[Tensor] = []
    for level in levels_of(tree, draws.device):
        logits = logits_at(level, tokens[:, level.parents] if level.number else tokens)
        distribution, is_finite = distribution_of(logits, tokens, level)
        drawn = draw_siblings(
            distribution, logits, level.counts, draws[:, level.start : level.start + sum(level.counts)], vocabulary
        )
        tokens = torch.cat([tokens, drawn], 1)
        distributions += [distribution[:, place] for place in range(len(level.counts))]
        finite.append(is_finite)
    return tokens, stack_distributions(distributions), torch.cat(finite, 1)


def draw_siblings(
    distribution: Distribution, logits: Tensor, counts: Sequence[int], draws: Tensor, vocabulary: Tensor | None = None
) -> Tensor:
    """Draw the children of nodes without replacement from each node's distribution: int64 [rows, sum of counts].

    distribution: [rows, nodes]. logits: [rows, nodes, n], those of the distribution, over `vocabulary`. counts: number
    of children of each node. draws: float64 [rows, sum of counts], or [rows, sum of counts, vocab] for races.
    Once a distribution has no token left, the token with the largest remaining logit is used.
    """
    siblings = _siblings(tuple(counts), draws.device)
    if isinstance(distribution, OneHot):
        return _ranked(distribution.tokens, logits, max(counts), vocabulary)[:, siblings.node, siblings.rank]
    drawn = torch.empty(draws.shape[:2], dtype=torch.int64, device=draws.device)
    for rank, (nodes, places) in enumerate(siblings.by_rank):
        taken = drawn[:, places[:, :-1]]
        rest, mass = without(distribution[:, nodes], taken)
        token = rest.draw(draws[:, places[:, -1]])
        if rank:
            likeliest = _likeliest(logits[:, nodes], taken, vocabulary)
            token = torch.where(mass.squeeze(-1) > 0, token, likeliest)
        drawn[:, places[:, -1]] = token
    return drawn


@dataclass(frozen=True, slots=True)
class _Siblings:
    """The children of some nodes, on a device, all int64.

    node, rank: [children], the node of each child, and its rank. by_rank: for ranks 0, 1, ..., the nodes that have such
    a child, [n], and the places of their children up to that rank among all children, [n, rank + 1].
    """

    node: Tensor
    rank: Tensor
    by_rank: tuple[tuple[Tensor, Tensor], ...]


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def _siblings(counts: tuple[int, ...], device: torch.device) -> _Siblings:
    """counts: number of children of each node."""

    def on_device(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    pairs = [(node, rank) for node, count in enumerate(counts) for rank in range(count)]
    firsts = [sum(counts[:node]) for node in range(len(counts))]
    by_rank = []
    for rank in range(max(counts)):
        nodes = [node for node, count in enumerate(counts) if count > rank]
        places = [[firsts[node] + before for before in range(rank + 1)] for node in nodes]
        by_rank.append((on_device(nodes), on_device(places)))
    return _Siblings(on_device([node for node, _ in pairs]), on_device([rank for _, rank in pairs]), tuple(by_rank))


def _ranked(first: Tensor, logits: Tensor, most: int, vocabulary: Tensor | None) -> Tensor:
    """The given tokens int64 [rows, nodes], each followed by the tokens with the largest other logits: [..., most]."""
    places = logits.topk(most).indices
    others = places if vocabulary is None else vocabulary[places]
    is_first = others == first.unsqueeze(-1)  # absent if a bias or a constraint selected it
    order = is_first.int().argsort(stable=True, dim=-1)[..., : most - 1]
    return torch.cat([first.unsqueeze(-1), others.gather(-1, order)], -1)


def _likeliest(logits: Tensor, taken: Tensor, vocabulary: Tensor | None) -> Tensor:
    """The tokens with the largest logits [rows, nodes, n], except those already taken, int64 [rows, nodes, rank]."""
    places = taken if vocabulary is None else torch.searchsorted(vocabulary, taken)
    # prefer even a forbidden token to one that is taken
    left = logits.clamp(min=torch.finfo(logits.dtype).min).scatter(-1, places, -torch.inf)
    best = largest(left)[1]
    return best if vocabulary is None else vocabulary[best]


def tree_uniforms(rows: RowParams, origins: Tensor, tree: Tree, uniforms: UniformSource) -> Tensor:
    """Uniforms to draw a tree, float64 [rows, nodes]; zeros if all rows are greedy.

    The nodes of a level share a position, each on its own branch. Coupled rows have one uniform per token of the
    vocabulary, shared with the target and by all nodes of a level: float64 [rows, nodes, vocab].
    """
    if rows.all_greedy:
        return torch.zeros(len(origins), len(tree), dtype=torch.float64, device=origins.device)
    origins = origins.unsqueeze(1)
    offsets, roles = _draws_of_nodes(tree, origins.device)
    if rows.coupled:
        levels = torch.arange(tree.depth, device=origins.device)
        return noise(rows.seeds, origins + levels, rows.vocab_size, uniforms)[:, offsets]
    return uniforms(rows.seeds.unsqueeze(1), origins + offsets, roles.expand(len(origins), -1), origins)


@cache  # unbounded: recordings hold the addresses of these tensors
def _draws_of_nodes(tree: Tree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position offsets and roles of the uniforms to draw the nodes, int64 [nodes]."""
    roles = [on_branch(Role.DRAFT, branch) for width in tree.widths for branch in range(width)]
    return torch.tensor(tree.depths, device=device) - 1, torch.tensor(roles, device=device)
