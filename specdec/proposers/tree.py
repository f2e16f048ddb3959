"""Drawing a draft that is a tree, level by level: the children of a node without replacement from its distribution."""

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
    """A level of a tree as its parents see it: which nodes have children there, and how many.

    number: 0 for the root. parents: the nodes, -1 being the root. counts: children of each.
    inner: the places of the parents among all nodes that have children, without the root: what a draft model is fed.
    above: of each parent the place of its own parent among the parents of the level before.
    """

    def __init__(self, tree: Tree, number: int) -> None:
        first, last = tree.num_within(number - 1), tree.num_within(number)
        self.number, self.start = number, last
        self.parents = [-1] if number == 0 else [node for node in range(first, last) if node in tree.families]
        self.counts = [tree.num_children(node) for node in self.parents]
        before = Level(tree, number - 1).parents if number else []
        self.above = [before.index(tree.parents[node]) for node in self.parents if number]
        self.lineage = [tree.lineage(node) for node in self.parents]
        fed = [node for node in tree.families if node >= 0]  # a draft is not asked what follows a leaf
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

    logits_at: (level, the tokens of its parents, int64 [rows, parents]; of the root none) -> logits of their children,
    [rows, parents, vocab]. vocabulary: int64, ascending, the tokens that the logits are of, or None for all.
    """
    device, rows = batch.sampling.device, batch.sampling.rows
    if not (batch.recorder and batch.recorder.records):  # there all drafts have one shape
        tree = tree.cut(max(limits))
    draws = tree_uniforms(rows, upload(batch.num_tokens(), device), tree, uniforms)
    tokens = torch.empty(len(batch.rows), 0, dtype=torch.int64, device=device)
    distributions: list[Distribution] = []
    finite: list[Tensor] = []
    for level in levels_of(tree):
        logits = logits_at(level, tokens[:, level.parents] if level.number else tokens)
        distribution, is_finite = batch.sampling.distribution(logits, tokens, vocabulary, level.lineage)
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
    """Children of some nodes, each node's without replacement from its distribution: int64 [rows, sum of counts].

    distribution: [rows, nodes]. logits: [rows, nodes, n], as the distribution's, of `vocabulary`. counts: children of
    each node.
    draws: float64 [rows, sum of counts], or [rows, sum of counts, vocab] for races.
    Where a distribution has no token left the most probable by the logits is taken.
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
    """Certain tokens, int64 [rows, nodes], and behind each the largest others by the logits: [rows, nodes, most]."""
    places = logits.topk(most).indices
    others = places if vocabulary is None else vocabulary[places]
    is_first = others == first.unsqueeze(-1)  # nowhere where a bias or a constraint chose it
    order = is_first.int().argsort(stable=True, dim=-1)[..., : most - 1]
    return torch.cat([first.unsqueeze(-1), others.gather(-1, order)], -1)


def _likeliest(logits: Tensor, taken: Tensor, vocabulary: Tensor | None) -> Tensor:
    """The tokens with the largest logits [rows, nodes, n] but for those that are taken, int64 [rows, nodes, rank]."""
    places = taken if vocabulary is None else torch.searchsorted(vocabulary, taken)
    # one that is forbidden, too, must come before one that is taken
    left = logits.clamp(min=torch.finfo(logits.dtype).min).scatter(-1, places, -torch.inf)
    best = largest(left)[1]
    return best if vocabulary is None else vocabulary[best]


def tree_uniforms(rows: RowParams, origins: Tensor, tree: Tree, uniforms: UniformSource) -> Tensor:
    """Uniforms that draw a tree, float64 [rows, nodes]; zeros where nothing is left to chance.

    The nodes of a level are at one position, each on a branch of its own. Coupled rows have one uniform for each token,
    the target's own, which all nodes of a level share: float64 [rows, nodes, vocab].
    """
    if rows.all_greedy:
        return torch.zeros(len(origins), len(tree), dtype=torch.float64, device=origins.device)
    origins = origins.unsqueeze(1)
    offsets, roles = _draws_of_nodes(tree, origins.device)
    if rows.coupled:
        levels = torch.arange(tree.depth, device=origins.device)
        return noise(rows.seeds, origins + levels, rows.vocab_size, uniforms)[:, offsets]
    return uniforms(rows.seeds.unsqueeze(1), origins + offsets, roles.expand(len(origins), -1), origins)


@cache  # without a limit: recordings read these tensors where they are
def _draws_of_nodes(tree: Tree, device: torch.device) -> tuple[Tensor, Tensor]:
    """Offsets and roles of the uniforms that draw the nodes, int64 [nodes]."""
    places = [place for width in tree.widths for place in range(width)]
    roles = [on_branch(Role.DRAFT, place) for place in places]
    return torch.tensor(tree.depths, device=device) - 1, torch.tensor(roles, device=device)
