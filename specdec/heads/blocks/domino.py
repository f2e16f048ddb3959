"""Domino: DFlash whose logits are corrected by a recurrent state of the tokens drafted so far.

A GRU reads the embeddings of the newest token and of the draft tokens before a place. The correction of the place is
embed_proj.2(SiLU(embed_proj.0([h; s]))), h being the place's hidden state and s the GRU's; the first
`pure_draft_prefix_len` tokens of a draft have none. Tokens are drawn one after the other, each from its exact
distribution given those before it. With `shift_label` the newest token's place drafts, too.
Sources: SpecForge `modeling/draft/dflash.py` (`projector_type: "domino"`); vllm-project/speculators `models/domino`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from specdec.heads.blocks.backbone import Block, BlockModule
from specdec.heads.blocks.checkpoints import dialect_of, is_block, load_block, required, setting, tensors_of
from specdec.heads.files import HeadFolder
from specdec.models.fusion import Projection

_INPUTS = "prefix_gru.weight_ih_l0"


class DominoHead(BlockModule):
    """A Domino head."""

    format = "domino"
    prefix_gru: nn.GRU
    embed_proj: nn.Sequential
    num_pure: int = 0

    def configure(self, folder: HeadFolder) -> None:
        width, size = self.config.hidden_size, required(folder, "gru_hidden_dim", 1)
        num_outputs = tensors_of(folder).shapes.get("embed_proj.2.weight", (0,))[0]
        narrow = required(folder, "emb_dim", 1)
        with torch.device("meta"):
            self.prefix_gru = nn.GRU(width, size, batch_first=True, bias=False)
            projections = [nn.Linear(width + size, narrow, bias=False), nn.Linear(narrow, num_outputs, bias=False)]
            self.embed_proj = nn.Sequential(projections[0], nn.SiLU(), projections[1])
        self.num_pure = int(setting(folder, "pure_draft_prefix_len", 0))

    def logits(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor:
        """Logits [rows, 1, draft vocab] of the next draft token, corrected by those before it."""
        place = drafted.shape[1]
        logits = block.logits[:, place : place + 1]
        if place < self.num_pure:
            return logits
        state = self._state(block, torch.cat([newest.unsqueeze(1), drafted], 1))
        correction: Tensor = self.embed_proj(torch.cat([block.hidden[:, place], state], -1))
        return logits + correction.unsqueeze(1)

    def _state(self, block: Block, texts: Tensor) -> Tensor:
        """The GRU's state [rows, n] after tokens int64 [rows, m]; block.memory holds those after fewer."""
        gru: Any = self.prefix_gru
        for index in range(len(block.memory), texts.shape[1]):
            before = block.memory[-1] if block.memory else block.hidden.new_zeros(len(texts), gru.hidden_size)
            read = embedding(texts[:, index], self.embedding).to(before.dtype)
            block.memory.append(torch.gru_cell(read, before, gru.weight_ih_l0, gru.weight_hh_l0))
        return block.memory[texts.shape[1] - 1]

    def fuse(self) -> None:
        super().fuse()
        for index in (0, 2):
            self.embed_proj[index] = Projection(self.embed_proj[index])  # type: ignore[arg-type]


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of a Domino head's folder, None if it is not one."""
    return dialect_of(folder) if is_block(folder) and _INPUTS in tensors_of(folder).shapes else None


def load(folder: HeadFolder, model: Any, load_format: str) -> DominoHead:
    """See `load_block`."""
    return load_block(folder, model, load_format, DominoHead)
