"""Acceptance rates of siblings by level and rank, measured by running the real decoding loop with a wide tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specdec.decoding import Decoder
from specdec.proposers.base import Proposer
from specdec.requests import Request
from specdec.sampling.distributions import Distribution
from specdec.sampling_params import SamplingParams
from specdec.trees.shape import MAX_LEVELS, Tree
from specdec.trees.verification import verify_tree
from specdec.verification import Draft, Rule, Verification

MIN_TRIED = 50  # samples a level needs to get rates of its own


@dataclass(frozen=True, slots=True)
class Counts:
    """By level and rank: how often a sibling existed below an accepted parent, and how often it was accepted."""

    tried: list[list[int]]
    accepted: list[list[int]]

    @classmethod
    def of(cls, tree: Tree) -> Counts:
        """Zero counts for a tree."""
        max_children = [
            max(tree.num_children(node) for node in tree.families if len(tree.lineage(node)) == level)
            for level in range(tree.depth)
        ]
        return cls([[0] * each for each in max_children], [[0] * each for each in max_children])

    def add(self, draft: Draft, outcome: Verification) -> None:
        """Count the outcome of a draft."""
        if draft.tree is None or outcome.path is None:
            return
        tree = draft.tree
        for num_nodes, path, num_accepted in zip(
            draft.num_proposed.tolist(), outcome.path.tolist(), outcome.accepted.tolist(), strict=True
        ):
            node = -1
            for level in range(num_accepted + 1):
                siblings = tree.num_children(node, num_nodes)
                for rank in range(siblings):
                    self.tried[level][rank] += 1
                if level == num_accepted or not siblings:
                    break
                node = path[level]
                self.accepted[level][tree.ranks[node]] += 1

    def acceptance(self) -> list[list[float]]:
        """Acceptance rates for `specdec.trees.optimal.optimal_tree`.

        Rarely reached levels take the rates of the previous one. Ranks that a level was not tried with keep the first
        level's ratio to the previous rank.
        """
        levels: list[list[float]] = []
        for tried, accepted in zip(self.tried, self.accepted, strict=True):
            if tried[0] < MIN_TRIED and levels:
                break
            rates = [a / max(t, 1) for t, a in zip(tried, accepted, strict=True)]
            for rank in range(len(rates), len(levels[0]) if levels else 0):
                before = levels[0][rank - 1]
                rates.append(rates[-1] * levels[0][rank] / before if before else 0.0)
            scale = min(1.0, 1 / max(sum(rates), 1e-9))
            levels.append([rate * scale for rate in rates])
        return levels + [levels[-1]] * (MAX_LEVELS - len(levels))


def count(
    target: Any,
    proposer: Proposer,
    prompts: Sequence[Sequence[int]],
    tree: Tree,
    temperatures: Sequence[float],
    *,
    max_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> Counts:
    """Decode prompts at each temperature and count acceptances. proposer: drafts trees of this shape.

    Source: Chen et al. 2024 (Sequoia), who measure acceptance rates in the same way.
    """
    counts = Counts.of(tree)

    @Rule
    def counting(target: Distribution, draft: Draft, accept_uniforms: Tensor, final_uniforms: Tensor) -> Verification:
        outcome = verify_tree(target, draft, accept_uniforms, final_uniforms)
        counts.add(draft, outcome)
        return outcome

    decoder = Decoder(target, proposer, len(tree), max_batch_size=batch_size, rule=counting, records=False)
    requests = [
        Request(
            index,
            tuple(prompt),
            SamplingParams(temperature=t, max_tokens=max_tokens, seed=seed + index),
            target.eos_token_ids,
        )
        for t in temperatures
        for index, prompt in enumerate(prompts)
    ]
    for _ in decoder.run(requests):
        pass
    return counts
