"""Draws a token tree level by level: the children of a node without replacement from its distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

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


class Level:
    """A level of a tree, by its parents.

    number: 0 for the children of the root. parents: nodes with children in the level; -1 is the root. counts: number of
    children of each. inner: indices of the parents among all nodes with children except the root, which are the input
    of a draft model. above: for each parent, the index of its own parent among the parents of the previous level.
    """

    def __init__(self, tree: Tree, number: int) -> None:
        first, last = tree.num_within(number - 1), tree.num_within(number)
        self.number, self.start = number, last
        self.parents = [-1] if number == 0 else [node for node in range(first, last) if node in tree.families]
        self.counts = [tree.num_children(node) for node in self.parents]
        before = Level(tree, number - 1).parents if number else []
        self.above = [before.index(tree.parents[node]) for node in self.parents if number]
        self.lineage = [tree.lineage(node) for node in self.parents]
        fed = [node for node in tree.families if node >= 0]  # leaves need no distribution
        numbers = {-1: -1} | {node: place for place, node in enumerate(fed)}
        known = [node for node in fed if node < last]
        self.branches = Branches(
            tuple(numbers[tree.parents[node]] for node in known), len(known) - (len(self.parents) if number else 0)
        )


@lru_cache(maxsize=64)
def levels_of(tree: Tree) -> list[Level]:
    """All levels of a tree, the children of the root first."""
    return [Level(tree, number) for number in range(tree.depth)]


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
    device, rows = batch.sampling.device, batch.sampling.rows
    if not (batch.recorder and batch.recorder.records):  # recorded drafts all have the same shape
        tree = tree.cut(max(limits))
    draws = tree_uniforms(rows, upload(batch.num_tokens(), device), tree, uniforms)
    tokens = torch.empty(len(batch.rows), 0, dtype=torch.int64, device=device)
    distributions: list[Distribution] = []
    finite: list[Tensor] = []
    for level in levels_of(tree):
        logits = logits_at(level, tokens[:, level.parents] if level.number else tokens)
        distribution, is_finite = batch.sampling.distribution(logits, tokens, vocabulary, level.lineage, of_draft=True)
        drawn = draw_siblings(
            distribution, logits, level.counts, draws[:, level.start : level.start + sum(level.counts)], vocabulary
        )
        tokens = torch.cat([tokens, drawn], 1)
        distributions += [distribution[:, place] for place in range(len(level.parents))]
        finite.append(is_finite)
    num_proposed = upload([tree.num_within(limit) for limit in limits], device)
    return Draft(tokens, num_proposed, stack_distributions(distributions), tree, torch.cat(finite, 1))


def draw_siblings(
    distribution: Distribution, logits: Tensor, counts: Sequence[int], draws: Tensor, vocabulary: Tensor | None = None
) -> Tensor:
    """Draw the children of nodes without replacement from each node's distribution: int64 [rows, sum of counts].

    distribution: [rows, nodes]. logits: [rows, nodes, n], those of the distribution, over `vocabulary`. counts: number
    of children of each node.
    draws: float64 [rows, sum of counts], or [rows, sum of counts, vocab] for races.
    Once a distribution has no token left, the token with the largest remaining logit is used.
    """
    if isinstance(distribution, OneHot):
        nodes = [node for node, count in enumerate(counts) for _ in range(count)]
        ranks = [rank for count in counts for rank in range(count)]
        return _ranked(distribution.tokens, logits, max(counts), vocabulary)[:, nodes, ranks]
    first = torch.tensor(counts, device=draws.device).cumsum(0) - torch.tensor(counts, device=draws.device)
    drawn = torch.empty(draws.shape[:2], dtype=torch.int64, device=draws.device)
    for rank in range(max(counts)):
        nodes = [node for node, count in enumerate(counts) if count > rank]
        taken = drawn[:, (first[nodes].unsqueeze(1) + torch.arange(rank, device=draws.device))]
        rest, mass = without(distribution[:, nodes], taken)
        token = rest.draw(draws[:, first[nodes] + rank])
        if rank:
            likeliest = _likeliest(logits[:, nodes], taken, vocabulary)
            token = torch.where(mass.squeeze(-1) > 0, token, likeliest)
        drawn[:, first[nodes] + rank] = token
    return drawn


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
