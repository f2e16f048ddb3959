"""A drafting method in one file: each token is drawn from all tokens alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.methods import MethodSpec, Parts
from specdec.proposers.base import Proposer
from specdec.proposers.chain import draw_chain
from specdec.requests import Batch
from specdec.sampling.randomness import uniforms
from specdec.verification import Draft


class GuessProposer(Proposer):
    """Draws every draft token from the uniform distribution."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.uniforms = vocab_size, uniforms

    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        def logits_after(drafted: Tensor) -> Tensor:
            return torch.zeros(len(batch.rows), 1, self.vocab_size)

        return draw_chain(batch, limits, logits_after, self.uniforms)


def build(parts: Parts) -> GuessProposer:
    return GuessProposer(parts.target.vocab_size)


GUESS = MethodSpec("guess", "tokens at random", build)
