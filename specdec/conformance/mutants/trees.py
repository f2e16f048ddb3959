"""T1 to T4: the additional bugs of token trees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec.conformance.mutants.planting import BrokenLoop, Maker, maker, with_rule
from specdec.models.base import score
from specdec.proposers.base import Proposer
from specdec.proposers.draft_model import DraftModelProposer
from specdec.proposers.tree import tree_uniforms
from specdec.requests import Batch
from specdec.runtime.devices import upload
from specdec.sampling.distributions import Dense, Distribution
from specdec.trees.shape import Tree
from specdec.trees.verification import verify_tree
from specdec.verification import (
    Draft,
    Rule,
    Verification,
)


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


class StaleMask(BrokenLoop):
    """T3: scores a tree with a causal mask, as if it were a chain."""

    def _score(self, batch: Batch, draft: Draft, cache: Any) -> Tensor:
        cache.num_cached[: len(batch.rows)] = [length - 1 for length in batch.num_tokens()]
        tokens = torch.cat([upload(batch.last_tokens(), self.target.device).unsqueeze(1), draft.tokens], 1)
        return score(self.target, tokens, cache, self.recorder)


class CompactsOffByOne(BrokenLoop):
    """T4: keeps the cache entry of the node preceding the accepted one."""

    def _compact(self, cache: Any, origins: Tensor, path: Tensor) -> None:
        super()._compact(cache, origins, (path - 1).clamp(min=0))


class NeverCompacts(BrokenLoop):
    """T4: does not move the cache entries of the accepted path."""

    def _compact(self, cache: Any, origins: Tensor, path: Tensor) -> None:
        pass


TREE_MUTANTS: dict[str, Callable[..., Maker]] = {  # called like `tree_maker`
    "T1 siblings with replacement": partial(tree_maker, break_proposer=SiblingsWithReplacement),
    "T1 late siblings with replacement": partial(tree_maker, break_proposer=LateSiblingsWithReplacement),
    "T2 wrong parent row": partial(tree_maker, break_rule=with_rule(wrong_parent_row)),
    "T3 stale mask": partial(tree_maker, decoder=StaleMask),
    "T4 compaction off by one": partial(tree_maker, decoder=CompactsOffByOne),
    "T4 no compaction": partial(tree_maker, decoder=NeverCompacts),
}
