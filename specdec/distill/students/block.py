"""DFlash heads in training: blocks after sampled places of a text, all in one pass over the text's context states.

Source: Chen et al. 2026 (arXiv:2602.06036), section 4; the loss weight of a slot decays with its distance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import distillation_loss
from specdec.distill.students.base import Anchors, Loss, all_anchors, by_depth, loss_tokens
from specdec.distill.students.cache import TrainingCache
from specdec.distill.students.scaling import scale_head
from specdec.distill.students.sequential import HeadBase
from specdec.heads.blocks.backbone import BlockModule, Sight


class BlockStudent(HeadBase):
    """A DFlash head with layers that attend both ways to everything. target, frequent, sizes: as for HeadStudent."""

    module: BlockModule
    one_pass = True

    def __init__(self, head: BlockModule, target: Any, frequent: Tensor, sizes: Tensor) -> None:
        super().__init__(head, target)
        self.frequent = frequent
        scale_head(head, sizes)

    def loss(self, batch: TextBatch, random: torch.Generator) -> Loss:
        num_tokens = self.module.max_tokens
        anchors = Anchors.drawn(batch, num_tokens)
        hidden, goals = self.hidden(batch, anchors.places, num_tokens), anchors.goals(batch)
        output, target_output = self.output_rows(loss_tokens(len(self.module.output), self.frequent, random))
        total, num_terms = torch.zeros((), device=hidden.device), 0
        for slot in range(num_tokens):
            is_known = anchors.has_next[:, :, slot]
            weight, number = math.exp(-slot / num_tokens), int(is_known.sum())
            if number:
                states = hidden[:, :, slot][is_known][None]
                goal = goals[:, :, slot][is_known]
                total = total + number * distillation_loss(states, output, goal, target_output, (weight,))
                num_terms += number
        return Loss(total / max(1, num_terms), num_terms)

    def hidden(self, batch: TextBatch, places: Tensor, num_tokens: int) -> Tensor:
        """What the output head reads for each slot that drafts, [texts, anchors, num_tokens, width].

        places: int64 [texts, anchors], of the newest token before each block.
        """
        head, cache = self.module, TrainingCache(len(self.module.layers))
        offsets = torch.arange(batch.tokens.shape[1], device=places.device)
        cache.open(offsets[None], torch.empty(0))  # the context attends to nothing
        head.enter(batch.inputs.float(), cache)  # type: ignore[arg-type]
        blocks = head.block_tokens(batch.tokens.gather(1, places).flatten(), num_tokens)
        size, num_anchors = blocks.shape[1], places.shape[1]
        of_anchor = torch.arange(num_anchors, device=places.device).repeat_interleave(size)
        before = places.repeat_interleave(size, 1)[:, :, None] > offsets
        own = (of_anchor[:, None] == of_anchor).expand(len(places), -1, -1)
        positions = places[:, :, None] + torch.arange(size, device=places.device)
        cache.open(positions.flatten(1), torch.cat([before, own], 2))
        masks = {Sight(): cache.mask(torch.float32)}
        embedded = head.embed(blocks.view(len(places), -1)).float()
        states = head.attend(embedded, cache, masks).unflatten(1, (num_anchors, size))  # type: ignore[arg-type]
        normed: Tensor = head.norm(states[:, :, -num_tokens:])
        return normed

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        hidden = self.hidden(batch, all_anchors(batch), depth)
        return [self.spread(self.module.base_logits(each)) for each in by_depth(hidden)]
