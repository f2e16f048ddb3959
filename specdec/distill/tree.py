"""How often a draft's siblings are accepted, by level and rank: a Monte Carlo run of the real loop with a wide tree."""

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

MIN_TRIED = 50  # times that a level must have been reached to be told apart from the one before


@dataclass(frozen=True, slots=True)
class Counts:
    """By level and rank: how often a sibling was there where its parent had been accepted, and how often it was it."""

    tried: list[list[int]]
    accepted: list[list[int]]

    @classmethod
    def of(cls, tree: Tree) -> Counts:
        """None yet."""
        most = [
            max(tree.num_children(node) for node in tree.families if len(tree.lineage(node)) == level)
            for level in range(tree.depth)
        ]
        return cls([[0] * each for each in most], [[0] * each for each in most])

    def add(self, draft: Draft, outcome: Verification) -> None:
        """Count what became of a draft; an idle row proposes nothing."""
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
        """The rates, as `specdec.trees.optimal.optimal_tree` takes them; rarely reached levels are like the one before.

        Ranks beyond those that a level was tried with keep the first level's ratio to the rank before.
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
    """Decode prompts at each temperature, and count. proposer: draws drafts of this tree.

    Source: Chen et al. 2024 (Sequoia), who measure acceptance in the same way.
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
