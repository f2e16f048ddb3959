"""P-EAGLE heads in training: mask tokens after sampled places of a text, all in one pass over the text's keys.

Source: vllm-project/speculators `models/peagle`, which likewise samples the places that masks are put after.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.distill.dataset import TextBatch
from specdec.distill.loss import distillation_loss
from specdec.distill.students.base import Anchors, Loss, all_anchors, by_depth, loss_tokens, scored_positions
from specdec.distill.students.cache import TrainingCache
from specdec.distill.students.scaling import scale_head
from specdec.distill.students.sequential import HeadBase
from specdec.heads.p_eagle import PEagleHead


class ParallelStudent(HeadBase):
    """A P-EAGLE head that drafts num_tokens in a pass.

    target, frequent, sizes: as for HeadStudent.
    """

    module: PEagleHead
    one_pass = True

    def __init__(self, head: PEagleHead, target: Any, frequent: Tensor, sizes: Tensor, num_tokens: int) -> None:
        super().__init__(head, target)
        self.frequent, self.num_tokens = frequent, num_tokens
        scale_head(head, sizes)

    def loss(self, batch: TextBatch, random: torch.Generator) -> Loss:
        anchors = Anchors.drawn(batch, self.num_tokens)
        first, masked = self.states(batch, anchors.places, self.num_tokens)
        scored, is_known = scored_positions(batch, 1), anchors.has_next[:, :, 1:]
        states = torch.cat([first[scored[:, 1:]], masked[is_known]])
        features = torch.cat([batch.features[scored], anchors.goals(batch)[:, :, 1:][is_known]])
        output, target_output = self.output_rows(loss_tokens(len(self.module.output), self.frequent, random))
        hidden = self.module.normed(states)
        return Loss(distillation_loss(hidden[None], output, features, target_output, (1.0,)), len(hidden))

    def states(self, batch: TextBatch, places: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """States of all tokens but the first, [texts, width - 1, n], and of masks, [texts, anchors, num_tokens - 1, n].

        places: int64 [texts, anchors], of the newest token before the masks; not the first.
        """
        head, cache, tokens = self.module, TrainingCache(len(self.module.layers)), batch.tokens[:, 1:]
        offsets = torch.arange(tokens.shape[1], device=tokens.device)
        cache.open(offsets[None], (offsets[:, None] >= offsets)[None])
        first = head.run(head.encode(batch.inputs.float()[:, :-1]), tokens, cache)  # type: ignore[arg-type]
        num_masks, num_anchors = num_tokens - 1, places.shape[1]
        columns = (places - 1).repeat_interleave(num_masks, 1)  # position i is of token i + 1
        number = torch.arange(num_masks, device=tokens.device).repeat(num_anchors)
        of_anchor = torch.arange(num_anchors, device=tokens.device).repeat_interleave(num_masks)
        own = (of_anchor[:, None] == of_anchor) & (number[:, None] >= number)
        before = columns[:, :, None] >= offsets
        cache.open(columns + 1 + number, torch.cat([before, own.expand(len(places), -1, -1)], 2))
        masks = head.mask_state().expand(*columns.shape, -1)
        made = head.run(masks, torch.full_like(columns, head.mask_token), cache)  # type: ignore[arg-type]
        return first, made.unflatten(1, (num_anchors, num_masks))

    def logits(self, batch: TextBatch, depth: int) -> list[Tensor]:
        first, masked = self.states(batch, all_anchors(batch), depth)
        states = torch.cat([first[:, :, None], masked], 2)
        return [self.spread(self.module.logits(each)) for each in by_depth(states)]
