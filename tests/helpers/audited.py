"""Toy engines to audit: a Markov target and a draft, with parts that can be replaced by broken ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specdec import SamplingParams
from specdec.decoding import Decoder
from specdec.models.markov import MarkovModel
from specdec.proposers.draft_model import DraftModelProposer
from specdec.requests import Generation, Request
from specdec.sampling.randomness import uniforms
from specdec.verification import verify_tokens

PROMPTS = [[1, 2], [3], [4, 0, 2]]


def distributions(seed: int, vocab_size: int = 8, sharpness: float = 1.5) -> Tensor:
    """A random table of distributions, float64 [vocab, vocab, vocab]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vocab_size, vocab_size, vocab_size, generator=generator).double().mul(sharpness).softmax(-1)


def leaning(target: Tensor, draft: Tensor, distance: float) -> Tensor:
    """The target's distributions moved by this distance in total variation to what the draft gives more."""
    more, less = (target * side for side in (draft > target, draft < target))
    return target + distance * (more / more.sum(-1, keepdim=True) - less / less.sum(-1, keepdim=True))


TARGET, DRAFT = (
    MarkovModel(distributions(1)),
    MarkovModel((distributions(1) * distributions(2)) / (distributions(1) * distributions(2)).sum(-1, keepdim=True)),
)


class ToyEngine:
    """An engine of two methods; `broken` are the parts of its speculative arm that are replaced."""

    def __init__(
        self,
        params: SamplingParams,
        target: MarkovModel = TARGET,
        draft: MarkovModel = DRAFT,
        decoder=Decoder,
        rule=verify_tokens,
        speculative_target: MarkovModel | None = None,
        stop: frozenset[int] = frozenset(),
        proposer=DraftModelProposer,
    ) -> None:
        self.params, self.target, self.draft, self.stop = params, target, draft, stop
        self.decoder, self.rule, self.speculative_target = decoder, rule, speculative_target or target
        self.proposer, self.num_drafted, self.num_accepted = proposer, 0, 0

    def speculative(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        decoder = self.decoder(
            self.speculative_target,
            self.proposer(self.draft, uniforms),
            3,
            max_batch_size=len(prompts),
            rule=self.rule,
        )
        rows = self._run(decoder, prompts, seeds, max_tokens)
        steps = [step for row in rows for step in row.steps]
        self.num_drafted += sum(step.num_drafted for step in steps)
        self.num_accepted += sum(step.num_accepted for step in steps)
        return [row.output for row in rows]

    def plain(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> list[list[int]]:
        rows = self._run(Decoder(self.target, max_batch_size=len(prompts)), prompts, seeds, max_tokens)
        return [row.output for row in rows]

    def _run(self, decoder: Decoder, prompts, seeds, max_tokens: int) -> list[Generation]:
        requests = [
            Request(index, tuple(prompt), replace(self.params, seed=seed, max_tokens=max_tokens), self.stop)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return sorted(decoder.run(requests), key=lambda row: row.request.index)
