"""Tree verification: several continuations are proposed at once, scored by one target call, and verified losslessly.

The children of a node are *siblings*: alternatives for one position, sampled without replacement from the draft
distribution there. Verification walks down from the root and tries the siblings of a node in turn, each as
`verify_tokens` tries a token. After a rejection the target distribution is replaced by the residual,
norm(max(target_probs - draft_probs, 0)), and the draft distribution by the one that the next sibling was sampled from:
the rejected token removed, and renormalized. The first accepted sibling is the next node. If all are rejected, the
recovered token is sampled from the last residual; at a leaf, the bonus token is sampled from the target distribution.

Why it is lossless: with one sibling this is the rule of `specdec.verification`, which holds for any target
distribution. After a rejection the remaining task is to sample from the residual, which is the same problem with one
sibling less. A chain is a tree with one path, and this is then `verify_tokens`.

If the draft distribution has no token left for a further sibling (greedy drafting, a narrow top-k), the most probable
of the remaining tokens is proposed with certainty, that is, from a one-hot distribution. At temperature 0 the siblings
are thus the draft's top choices.

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
    """A distribution with some tokens removed, not renormalized, and its mass.

    distribution: [...]. taken: int64 [..., n]. Returns distributions [...] and float [..., 1]; mass 0 means that no
    token is left.
    """
    if isinstance(distribution, OneHot):
        return distribution, (distribution.tokens.unsqueeze(-1) != taken).all(-1, keepdim=True).double()
    if isinstance(distribution, Partial):
        inner, mass = without(distribution.inner, _inner_index(distribution, taken))
        assert isinstance(inner, Dense)
        return Partial(inner, distribution.tokens, distribution.vocab_size), mass
    probs = distribution.probs.scatter(-1, taken, 0.0)
    return Dense(probs), row_sums(probs)


def sibling_distribution(distribution: Distribution, taken: Tensor, tokens: Tensor) -> Distribution:
    """The distribution that a sibling was sampled from: the family's without the earlier siblings, or one-hot if
    nothing is left.

    distribution: the family's, [...]. taken: int64 [..., n], the earlier siblings. tokens: int64 [...], the sibling.
    """
    if taken.shape[-1] == 0:
        return distribution
    if isinstance(distribution, OneHot):
        is_left = without(distribution, taken)[1].squeeze(-1) > 0
        return OneHot(torch.where(is_left, distribution.tokens, tokens), distribution.vocab_size)
    if isinstance(distribution, Partial):
        indices = (_inner_index(distribution, each) for each in (taken, tokens))
        inner = sibling_distribution(distribution.inner, *indices)
        assert isinstance(inner, Dense)
        return Partial(inner, distribution.tokens, distribution.vocab_size)
    rest, mass = without(distribution, taken)
    one_hot = torch.zeros_like(distribution.probs).scatter(-1, tokens.unsqueeze(-1), 1.0)
    return Dense(torch.where(mass > 0, rest.dense() / mass, one_hot))


def _inner_index(distribution: Partial, tokens: Tensor) -> Tensor:
    """The indices of tokens in the subset that the distribution covers."""
    return torch.searchsorted(distribution.tokens, tokens).clamp(max=len(distribution.tokens) - 1)


# ---- verification


@dataclass(frozen=True, slots=True)
class _Layout:
    """A tree as tensors.

    By column (the root, then the nodes), int64 [k + 1]: first_child, num_children, family. By node, int64 [k]: number,
    parent (its column), depth. lineage: float [k, k], 1 where the row's node is the column's or an ancestor of it.
    max_children: maximum number of children, by level of the parent.
    """

    first_child: Tensor
    num_children: Tensor
    family: Tensor
    number: Tensor
    parent: Tensor
    depth: Tensor
    lineage: Tensor
    max_children: tuple[int, ...]

    @classmethod
    def of(cls, tree: Tree, device: torch.device) -> _Layout:
        counts = [tree.num_children(node) for node in range(-1, len(tree))]
        firsts = [tree.parents.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        families = [tree.families.index(node) if count else 0 for node, count in enumerate(counts, -1)]
        levels = (0, *tree.depths)
        max_children = tuple(
            max(count for count, level in zip(counts, levels, strict=True) if level == depth)
            for depth in range(tree.depth)
        )
        before = [parent + 1 for parent in tree.parents]
        lists = (firsts, counts, families, range(len(tree)), before, tree.depths)
        first_child, num_children, family, number, parent, depth = (torch.tensor(each, device=device) for each in lists)
        lineage = tree.ancestors.T.float().to(device)
        return cls(first_child, num_children, family, number, parent, depth, lineage, max_children)


@cache  # unbounded: CUDA graphs hold pointers to these tensors
def _layout(tree: Tree, device: torch.device) -> _Layout:
    return _Layout.of(tree, device)


@Rule
def verify_tree(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
    """Verify a tree by recursive rejection sampling over siblings. Chains go to `verify_tokens`.

    Args:
        target: the target distributions, [batch, k + 1], after the text and after each of the k nodes.
        draft: k nodes per row with one distribution per family of siblings.
        accept_uniforms: float64 [batch, k] in [0, 1), one per node's accept test.
        final_uniforms: float64 [batch, levels + 1] in [0, 1); column i samples the recovered or bonus token after i
            accepted ones.

    Returns:
        The accepted path of each row and its recovered or bonus token.

    Source: Miao et al. 2024, Algorithm 2; Chen et al. 2024, Algorithm 2.
    """
    if draft.tree is None:
        return verify_tokens(target, draft, accept_uniforms, final_uniforms)
    if isinstance(target, OneHot):
        return _follow(target.tokens, draft)
    walk = _Walk(target, draft)
    for level, max_children in enumerate(walk.layout.max_children):
        walk.descend(level, max_children, accept_uniforms)
        if _surely_none(walk.going):
            break
    uniform = final_uniforms.gather(1, walk.accepted.unsqueeze(1)).squeeze(1)
    return Verification(walk.accepted, Dense(walk.probs).draw(uniform), walk.path)


@partial(Rule, needs_noise=True)
def verify_coupled_tree(
    target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor
) -> Verification:
    """Verify a tree by comparison: the target samples its own token at each position, and a matching sibling is kept.

    Arguments as for `verify_tree`, but accept_uniforms is ignored and final_uniforms is float64
    [batch, levels + 1, vocab], the noise of each position, shared by siblings.
    """
    if draft.tree is None:
        return verify_coupled(target, draft, accept_uniforms, final_uniforms)
    depths = _layout(draft.tree, draft.tokens.device).depth
    levels = torch.cat([depths.new_zeros(1), depths])
    return _follow(target.draw(final_uniforms[:, levels]), draft)


class _Walk:
    """The current node of each row, and the distribution of the next token there.

    column: int64 [batch], 0 at the root, else node + 1. probs: float [batch, vocab], the target distribution at the
    node, or the residual once siblings were rejected. going: bool [batch], False once a level accepted nothing.
    """

    def __init__(self, target: Distribution, draft: Draft) -> None:
        assert draft.tree is not None
        self.target, self.draft = target, draft
        self.layout = _layout(draft.tree, draft.tokens.device)
        self.accepted = torch.zeros_like(draft.num_proposed)
        self.column, self.going = self.accepted, self.accepted == 0
        self.path = _identity_path(draft, len(self.layout.max_children))
        self.probs = target.at(self.column).dense()

    def descend(self, level: int, max_children: int, accept_uniforms: Tensor) -> None:
        """Try the children of each row's node and move to the accepted one."""
        distribution = self.draft.distribution.at(self.layout.family[self.column])
        first = self.layout.first_child[self.column]
        count = torch.minimum(self.layout.num_children[self.column], self.draft.num_proposed - first)
        taken, chosen = first.new_empty(len(first), 0), torch.full_like(first, -1)
        for rank in range(max_children):
            tried = self.going & (chosen < 0) & (rank < count)
            if _surely_none(tried):
                break
            node = (first + rank).clamp(max=self.draft.tokens.shape[1] - 1).unsqueeze(1)
            token = self.draft.tokens.gather(1, node).squeeze(1)
            sibling = sibling_distribution(distribution, taken, token)
            passed = self._passes(sibling, token, accept_uniforms.gather(1, node).squeeze(1)) & tried
            chosen = torch.where(passed, first + rank, chosen)
            self._reject(sibling, tried & ~passed)
            taken = torch.cat([taken, token.unsqueeze(1)], 1)
        self._enter(level, chosen)

    def _passes(self, sibling: Distribution, token: Tensor, uniform: Tensor) -> Tensor:
        # strict <, as in `verify_tokens`: at u = 0 an impossible token must lose
        return uniform * sibling.prob(token) < Dense(self.probs).prob(token)

    def _reject(self, sibling: Distribution, rejected: Tensor) -> None:
        if not _surely_none(rejected):
            self.probs = torch.where(rejected.unsqueeze(1), residual(self.probs, sibling), self.probs)

    def _enter(self, level: int, chosen: Tensor) -> None:
        self.going = chosen >= 0
        self.accepted = self.accepted + self.going
        self.column = torch.where(self.going, chosen + 1, self.column)
        self.path[:, level] = torch.where(self.going, chosen, level)
        if not _surely_none(self.going):
            target_probs = self.target.at(self.column).dense()
            self.probs = torch.where(self.going.unsqueeze(1), target_probs, self.probs)


def _follow(tokens: Tensor, draft: Draft) -> Verification:
    """Accept the nodes that match the target's tokens, int64 [batch, k + 1], after the text and after each node."""
    assert draft.tree is not None
    layout = _layout(draft.tree, tokens.device)
    proposed = layout.number < draft.num_proposed.unsqueeze(1)
    agrees = (draft.tokens == tokens[:, layout.parent]) & proposed
    on_path = agrees.float() @ layout.lineage == layout.depth  # the node and its ancestors match
    accepted = on_path.sum(1)
    nodes = torch.where(on_path, layout.number, len(layout.number)).sort(1).values
    identity = _identity_path(draft, len(layout.max_children))
    path = torch.where(identity < accepted.unsqueeze(1), nodes[:, : identity.shape[1]], identity)
    end = torch.where(on_path, layout.number + 1, 0).amax(1, keepdim=True)
    return Verification(accepted, tokens.gather(1, end).squeeze(1), path)


def _identity_path(draft: Draft, num_levels: int) -> Tensor:
    """The path 0, 1, ... in each row, for which no cache entry moves."""
    return torch.arange(num_levels, device=draft.tokens.device).repeat(len(draft.tokens), 1)


def _surely_none(mask: Tensor) -> bool:
    """Whether a mask is all False. Always False on a GPU, where asking would synchronize and break graph capture."""
    return mask.device.type == "cpu" and not bool(mask.any())
