"""Protocols of drafts in training, and what their losses share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from specdec.distill.dataset import TextBatch


class Guesser(Protocol):
    """A draft that predicts along a text.

    target_output: the target's output matrix [vocab, hidden]. one_pass: whether a draft of any length takes one pass.
    """

    target_output: Tensor
    one_pass: bool

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        """For each draft position d, logits [texts, width, vocab] of the token after j, with d draft tokens before."""
        ...


@dataclass(frozen=True, slots=True)
class Loss:
    """A training loss. mean: over num_terms predictions, so that losses of parts of a batch can be combined."""

    mean: Tensor
    num_terms: int


class Student(Guesser, Protocol):
    """A draft in training."""

    @property
    def module(self) -> nn.Module:
        """The module with the trained parameters."""
        ...

    def loss(self, batch: TextBatch, random: torch.Generator) -> Loss:
        """The training loss. random: the same for all parts of a batch."""
        ...


def scored_positions(batch: TextBatch, num_before: int) -> Tensor:
    """Positions with a next token and num_before earlier tokens: bool [texts, width].

    Includes positions in prompts: the target's distribution there is equally useful, and already computed.
    """
    positions = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return (positions >= num_before) & (positions < batch.lengths[:, None] - 1)


def loss_tokens(size: int, frequent: Tensor, random: torch.Generator) -> Tensor:
    """The frequent tokens and half as many random ones of `size`, ascending."""
    others = torch.randint(size, (len(frequent) // 2,), generator=random)
    tokens: Tensor = torch.cat([frequent, others.to(frequent.device)]).unique()
    return tokens


# ---- drafts of several tokens in one pass


@dataclass(frozen=True, slots=True)
class Anchors:
    """Places of a batch that drafts begin after.

    places: int64 [texts, anchors], of the newest token. has_next: bool [texts, anchors, num_tokens], whether the text
    has the token that a draft position stands for.
    """

    places: Tensor
    has_next: Tensor

    @classmethod
    def drawn(cls, batch: TextBatch, num_tokens: int) -> Anchors:
        """One place for each of the batch's uniforms, in texts of at least three tokens any but the first and last."""
        assert batch.uniforms is not None, "drawn by the training loop"
        span = (batch.lengths - 2).clamp(min=1)[:, None]
        places = 1 + (batch.uniforms * span).long().clamp(max=span - 1)
        positions = places[:, :, None] + torch.arange(num_tokens, device=places.device)
        return cls(places, positions < batch.lengths[:, None, None] - 1)

    def goals(self, batch: TextBatch) -> Tensor:
        """The target's features before each draft token, [texts, anchors, num_tokens, hidden]."""
        width = batch.tokens.shape[1]
        positions = self.places[:, :, None] + torch.arange(self.has_next.shape[2], device=self.places.device)
        rows = torch.arange(len(self.places), device=self.places.device)[:, None, None]
        return batch.features[rows, positions.clamp(max=width - 1)]


def all_anchors(batch: TextBatch) -> Tensor:
    """Every place but the first, int64 [texts, width - 1]."""
    num_texts, width = batch.tokens.shape
    return torch.arange(1, width, device=batch.tokens.device).expand(num_texts, -1)


def by_depth(states: Tensor) -> list[Tensor]:
    """States [texts, width, n] of each draft position, of states [texts, width - 1, depth, n] of `all_anchors`.

    At j is what predicts the token after token j; 0 where no draft reaches.
    """
    depth, width = states.shape[2], states.shape[1] + 1
    return [pad(states[:, :, place], (0, 0, 1 + place, 0))[:, :width] for place in range(depth)]
