"""Heads that draft token by token in training: EAGLE, EAGLE-3 and MTP.

A head predicts the next-token distribution at every token of a text at once. It also predicts it with its own states in
place of the last features, as when it drafts several tokens, which EAGLE-3 calls the training-time test. The forward
pass is the one that decoding uses. Source: Li et al. 2025 (arXiv:2503.01840), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import distillation_loss
from specdec.distill.students.base import Loss, loss_tokens, scored_positions
from specdec.distill.students.cache import TrainingCache
from specdec.distill.students.scaling import scale_head
from specdec.heads.sequential import HeadModule, SequentialModule
from specdec.sampling.distributions import spread

PLACE_WEIGHTS = (1.0, 0.7, 0.5)  # loss weight of the first, second, third token of a draft


class HeadBase:
    """A head and its target's output matrix. target: the transformers model."""

    def __init__(self, head: Any, target: Any) -> None:
        self.module = head
        self.target_output = target.get_output_embeddings().weight.detach()

    def output_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the head's and of the target's output matrix for these indices into the draft vocabulary."""
        head: HeadModule = self.module
        return head.output[tokens], self.target_output[head.draft_vocabulary[tokens]]

    def spread(self, logits: Tensor) -> Tensor:
        """Logits of the draft vocabulary as logits [..., vocab] of all tokens."""
        head: HeadModule = self.module
        return spread(logits, head.draft_vocabulary, head.vocab_size, -torch.inf)


class HeadGuesser(HeadBase):
    """A trained head that drafts token by token."""

    module: SequentialModule
    one_pass = False

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        return [self.spread(self.module.logits(states)) for states in unroll(self.module, batch, depth)]


class HeadStudent(HeadGuesser):
    """A head that drafts token by token, unrolled over its own states for len(place_weights) tokens.

    target: the transformers model. frequent: int64 indices into the draft vocabulary, as for DraftStudent.
    sizes: float [features], the root mean square of each of the features that the head reads.
    """

    def __init__(
        self,
        head: SequentialModule,
        target: Any,
        frequent: Tensor,
        sizes: Tensor,
        place_weights: Sequence[float] = PLACE_WEIGHTS,
    ) -> None:
        super().__init__(head, target)
        self.frequent, self.place_weights = frequent, place_weights
        scale_head(head, sizes)

    def loss(self, batch: TextBatch, random: torch.Generator) -> Loss:
        depth = len(self.place_weights)
        positions = scored_positions(batch, depth)
        output, target_output = self.output_rows(loss_tokens(len(self.module.output), self.frequent, random))
        states = torch.stack([each[positions] for each in unroll(self.module, batch, depth)])
        hidden = self.module.normed(states)
        mean = distillation_loss(hidden, output, batch.features[positions], target_output, self.place_weights)
        return Loss(mean, hidden.shape[1])


def unroll(head: SequentialModule, batch: TextBatch, depth: int) -> list[Tensor]:
    """The head's states for each draft position: [texts, width, state width], at j for token j.

    At draft position d (from 0), the states before the last d tokens up to j are the head's own of draft positions 0 to
    d - 1; earlier ones are made of the target's features. The state at token 0, which has no feature before it, is 0.
    """
    tokens, states = batch.tokens[:, 1:], head.encode(batch.inputs.float()[:, :-1])
    offsets = torch.arange(tokens.shape[1], device=tokens.device)
    distance = offsets[:, None] - offsets  # from a key to a later query
    cache, unrolled = TrainingCache(len(head.layers)), []
    for place in range(depth):
        # keys from the target's features are those of place 0; keys from the head's own states, of the later places
        visible = [distance >= place, *(distance == place - earlier for earlier in range(1, place + 1))]
        cache.open(offsets[None], torch.cat(visible, 1)[None])
        made: Tensor = head.run(states, tokens, cache)  # type: ignore[arg-type]  # it reads no more of a cache
        unrolled.append(pad(made, (0, 0, 1, 0)))
        states = unrolled[-1][:, :-1].to(states.dtype)
    return unrolled
