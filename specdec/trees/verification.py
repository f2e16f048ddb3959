"""Verifying token trees: several continuations proposed at once, scored by one target call, accepted without loss.

A node's children are *siblings*: alternatives for one position, drawn without replacement from the draft's
distribution there. Verification walks down from the root. At a node it tries the siblings in turn, each as
`verify_tokens` tries a token; after a rejection the target's distribution becomes the residual, norm(max(target -
draft, 0)), and the draft's distribution is what the next sibling was drawn from: without the rejected one,
renormalised. The first sibling that is accepted is the next node. Where none is, the last residual gives the recovered
token; at a leaf the target's distribution gives the bonus token.

Why the token kept at a position has the target's distribution: with one sibling this is the rule of
`specdec.verification`, for any target distribution. What remains after a rejection is to draw from the residual, which
is the same task with a sibling less. A chain is a tree with one path, for which this is `verify_tokens`.

Where the draft's distribution has no token left for a further sibling (greedy drafting, a narrow top-k), the most
probable of the others is proposed with certainty, so with a one-hot distribution: at temperature 0 siblings are the
draft's first choices.

Sources: Miao et al. 2024 (SpecInfer, arXiv:2305.09781), multi-step speculative sampling; Chen et al. 2024 (Sequoia,
arXiv:2402.12374), sampling without replacement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from specdec.sampling.distributions import Dense, Distribution, OneHot, Partial, row_sums
from specdec.trees.shape import Tree
from specdec.verification import Draft, Rule, Verification, residual, verify_coupled, verify_tokens

# ---- the distribution of a sibling


def without(distribution: Distribution, taken: Tensor) -> tuple[Distribution, Tensor]:
    """A distribution without some tokens, not renormalised, and its mass.

    distribution: [...]. taken: int64 [..., n]. Returns distributions [...] and float [..., 1]; where the mass is 0 no
    token is left.
    """
    if isinstance(distribution, OneHot):
        return distribution, (distribution.tokens.unsqueeze(-1) != taken).all(-1, keepdim=True).double()
    if isinstance(distribution, Partial):
        inner, mass = without(distribution.inner, _places(distribution, taken))
        assert isinstance(inner, Dense)
        return Partial(inner, distribution.tokens, distribution.vocab_size), mass
    probs = distribution.probs.scatter(-1, taken, 0.0)
    return Dense(probs), row_sums(probs)


def sibling_distribution(distribution: Distribution, taken: Tensor, tokens: Tensor) -> Distribution:
    """The distribution that a sibling was drawn from, given those before it: theirs without these, or one-hot if that
    is empty.

    distribution: the family's, [...]. taken: int64 [..., n], the siblings before. tokens: int64 [...], the sibling.
    """
    if taken.shape[-1] == 0:
        return distribution
    if isinstance(distribution, OneHot):
        left = without(distribution, taken)[1].squeeze(-1) > 0
        return OneHot(torch.where(left, distribution.tokens, tokens), distribution.vocab_size)
    if isinstance(distribution, Partial):
        inner = sibling_distribution(distribution.inner, _places(distribution, taken), _places(distribution, tokens))
        assert isinstance(inner, Dense)
        return Partial(inner, distribution.tokens, distribution.vocab_size)
    rest, mass = without(distribution, taken)
    certain = torch.zeros_like(distribution.probs).scatter(-1, tokens.unsqueeze(-1), 1.0)
    return Dense(torch.where(mass > 0, rest.dense() / mass, certain))


def _places(distribution: Partial, tokens: Tensor) -> Tensor:
    """Where tokens, which the distribution is over, stand among its own."""
    return torch.searchsorted(distribution.tokens, tokens).clamp(max=len(distribution.tokens) - 1)


# ---- verification


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tree as tensors. By column, the root's and then the nodes': first_child, num_children, family, int64 [k + 1].

    By node: number, parent, the column of its parent, and depth, int64 [k]; lineage: float [k, k], 1 where the node of
    the row stands on the way to that of the column, or is it.
    """

    first_child: Tensor
    num_children: Tensor
    family: Tensor
    number: Tensor
    parent: Tensor
    depth: Tensor
    lineage: Tensor
    most_children: tuple[int, ...]  # by level of the parent

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> _Layout:
        counts = [tree.num_children(node) for node in range(-1, len(tree))]
        firsts = [tree.parents.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        families = [tree.families.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        levels = (0, *tree.depths)
        most = tuple(
            max(count for count, level in zip(counts, levels, strict=True) if level == depth)
            for depth in range(tree.depth)
        )
        before = [parent + 1 for parent in tree.parents]
        lists = (firsts, counts, families, range(len(tree)), before, tree.depths)
        first_child, num_children, family, number, parent, depth = (torch.tensor(each, device=device) for each in lists)
        lineage = tree.ancestors.T.float().to(device)
        return cls(first_child, num_children, family, number, parent, depth, lineage, most)


@cache  # without a limit: recordings read these tensors where they are
def _layout(tree: Tree, device: torch.device) -> _Layout:
    return _Layout.of(tree, device)


@Rule
def verify_tree(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Verify a tree by recursive rejection over siblings; a draft that is a chain by `verify_tokens`.

    target: the target's distributions [batch, k + 1], after the text and after each of the k nodes.
    accept_uniforms: float64 [batch, k], one for each node's test.
    final_uniforms: float64 [batch, levels + 1]; column i draws the last token if i tokens were accepted.
    Source: Miao et al. 2024, Algorithm 2; Chen et al. 2024, Algorithm 2.
    """
    if draft.tree is None:
        return verify_tokens(target, draft, accept_uniforms, final_uniforms)
    if isinstance(target, OneHot):
        return _follow(target.tokens, draft)
    walk = _Walk(target, draft)
    for level, most_children in enumerate(walk.layout.most_children):
        walk.descend(level, most_children, accept_uniforms)
        if _is_none(walk.going):
            break
    uniform = final_uniforms.gather(1, walk.accepted.unsqueeze(1)).squeeze(1)
    return Verification(walk.accepted, Dense(walk.probs).draw(uniform), walk.path)


@partial(Rule, needs_noise=True)
def verify_coupled_tree(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """Coupled verification of a tree: the target draws its own token at each position, and a sibling that is it stays.

    final_uniforms: float64 [batch, levels + 1, vocab], the noise of each position, which siblings have in common.
    """
    if draft.tree is None:
        return verify_coupled(target, draft, accept_uniforms, final_uniforms)
    depths = _layout(draft.tree, draft.tokens.device).depth
    levels = torch.cat([depths.new_zeros(1), depths])
    return _follow(target.draw(final_uniforms[:, levels]), draft)


class _Walk:
    """Where each row stands in its tree, and the distribution of what comes next there.

    column: int64 [batch], 0 at the root, else node + 1. probs: float [batch, vocab], the target's distribution there,
    or the residual where siblings were rejected. going: bool [batch], False where the last level accepted nothing.
    """

    def __init__(self, target: Distribution, draft: Draft) -> None:
        assert draft.tree is not None
        self.target, self.draft = target, draft
        self.layout = _layout(draft.tree, draft.tokens.device)
        self.accepted = torch.zeros_like(draft.num_proposed)
        self.column, self.going = self.accepted, self.accepted == 0
        self.path = _own_places(draft, len(self.layout.most_children))
        self.probs = target.at(self.column).dense()

    def descend(self, level: int, most_children: int, accept_uniforms: Tensor) -> None:
        """Try the children of each row's node; go to the one that is accepted."""
        distribution, first = (
            self.draft.distribution.at(self.layout.family[self.column]),
            self.layout.first_child[self.column],
        )
        count = torch.minimum(self.layout.num_children[self.column], self.draft.num_proposed - first)
        taken, chosen = first.new_empty(len(first), 0), torch.full_like(first, -1)
        for rank in range(most_children):
            tried = self.going & (chosen < 0) & (rank < count)
            if _is_none(tried):
                break
            place = (first + rank).clamp(max=self.draft.tokens.shape[1] - 1).unsqueeze(1)
            token = self.draft.tokens.gather(1, place).squeeze(1)
            sibling = sibling_distribution(distribution, taken, token)
            passed = self._passes(sibling, token, accept_uniforms.gather(1, place).squeeze(1)) & tried
            chosen = torch.where(passed, first + rank, chosen)
            self._reject(sibling, tried & ~passed)
            taken = torch.cat([taken, token.unsqueeze(1)], 1)
        self._enter(level, chosen)

    def _passes(self, sibling: Distribution, token: Tensor, uniform: Tensor) -> Tensor:
        # strict <, as in `verify_tokens`: at u = 0 an impossible token must lose
        return uniform * sibling.prob(token) < Dense(self.probs).prob(token)

    def _reject(self, sibling: Distribution, rejected: Tensor) -> None:
        if not _is_none(rejected):
            self.probs = torch.where(rejected.unsqueeze(1), residual(self.probs, sibling), self.probs)

    def _enter(self, level: int, chosen: Tensor) -> None:
        self.going = chosen >= 0
        self.accepted = self.accepted + self.going
        self.column = torch.where(self.going, chosen + 1, self.column)
        self.path[:, level] = torch.where(self.going, chosen, level)
        if not _is_none(self.going):
            here = self.target.at(self.column).dense()
            self.probs = torch.where(self.going.unsqueeze(1), here, self.probs)


def _follow(tokens: Tensor, draft: Draft) -> Verification:
    """Keep the nodes that are what the target says: tokens int64 [batch, k + 1], after the text and after each node."""
    assert draft.tree is not None
    layout = _layout(draft.tree, tokens.device)
    proposed = layout.number < draft.num_proposed.unsqueeze(1)
    agrees = (draft.tokens == tokens[:, layout.parent]) & proposed
    on_path = agrees.float() @ layout.lineage == layout.depth  # the node and all before it; siblings are different
    accepted = on_path.sum(1)
    places = torch.where(on_path, layout.number, len(layout.number)).sort(1).values
    own = _own_places(draft, len(layout.most_children))
    path = torch.where(own < accepted.unsqueeze(1), places[:, : own.shape[1]], own)
    end = torch.where(on_path, layout.number + 1, 0).amax(1, keepdim=True)
    return Verification(accepted, tokens.gather(1, end).squeeze(1), path)


def _own_places(draft: Draft, num_levels: int) -> Tensor:
    """The path that moves nothing: 0, 1, ... in each row."""
    return torch.arange(num_levels, device=draft.tokens.device).repeat(len(draft.tokens), 1)


def _is_none(mask: Tensor) -> bool:
    """Whether nothing is left to do, where to ask costs nothing; elsewhere, and where steps are recorded, never."""
    return mask.device.type == "cpu" and not bool(mask.any())
