"""DFlash: all tokens of a draft in one pass, each independent of the others given the block.

See `specdec.heads.blocks.backbone`. The head has neither an embedding nor an output head of its own. Its drafts are
drawn slot by slot, so that their distribution is the product of the slots' distributions.
Sources: Chen et al. 2026 (arXiv:2602.06036); z-lab/dflash `dflash/model.py`; vllm-project/speculators `models/dflash`.
"""

from __future__ import annotations

from typing import Any

from specdec.heads.blocks.backbone import BlockModule
from specdec.heads.blocks.checkpoints import dialect_of, is_block, load_block, tensors_of
from specdec.heads.files import HeadFolder

_OF_KIN = ("markov_head.", "candidate_selector.", "prefix_gru.")  # tensors of formats that extend it


class DFlashHead(BlockModule):
    """A DFlash head."""

    format = "dflash"


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of a DFlash head's folder, None if it is not one."""
    is_kin = any(name.startswith(_OF_KIN) for name in tensors_of(folder).shapes)
    return dialect_of(folder) if is_block(folder) and not is_kin else None


def load(folder: HeadFolder, model: Any, load_format: str) -> DFlashHead:
    """See `load_block`."""
    return load_block(folder, model, load_format, DFlashHead)
