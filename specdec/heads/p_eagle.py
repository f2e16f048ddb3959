"""P-EAGLE: an EAGLE-3 head that was trained to draft several tokens in one pass.

After the newest token it reads mask tokens, whose state is that of one learned vector in the place of the target's
features; the logits at each of these places are of one draft token. Sources: vLLM `llama_eagle3.py`;
vllm-project/speculators `models/peagle`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads import eagle3
from specdec.heads.base import Drafting
from specdec.heads.checkpoints import Lender, Shapes
from specdec.heads.eagle3 import Eagle3Head, Wiring
from specdec.heads.files import HeadFolder
from specdec.runtime.artifacts import LoadError

MASK = "mask_hidden"
_TOKENS = ("mask_token_id", "ptd_token_id", "pard_token")  # names of the mask token in configs


class PEagleHead(Eagle3Head):
    """An EAGLE-3 head with a vector of features for mask tokens, on the meta device; `load` fills it.

    mask_token: the token id whose embedding stands at the places of mask tokens.
    """

    format = "p_eagle"
    drafting: Drafting = "parallel"
    mask_token: int

    def __init__(self, wiring: Wiring, config: Any, shapes: Shapes, lender: Lender) -> None:
        super().__init__(wiring, config, shapes, lender)
        leading = (1,) * (len(shapes[MASK]) - 1)  # the vector may be stored flat or as a batch of one
        size = len(wiring.feature_layers) * lender.hidden_size
        self.mask_hidden = nn.Parameter(torch.empty(*leading, size, device="meta"), requires_grad=False)

    def mask_state(self) -> Tensor:
        """The state of a mask token, [width]."""
        return self.encode(self.mask_hidden.flatten())


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of a P-EAGLE head's folder, None if it is not one."""
    return eagle3.dialect_of(folder) if MASK in folder.shapes else None


def load(folder: HeadFolder, model: Any, load_format: str) -> PEagleHead:
    """Load a head for a transformers model; errors as for `eagle3.load`, and for a config without a mask token."""
    token = next((folder.config[name] for name in _TOKENS if folder.config.get(name) is not None), None)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise LoadError(
            f"{' or '.join(_TOKENS)}={token!r} in the config of {str(folder.path)!r} must be a token of the target's "
            f"{vocab_size}; copy the head again"
        )
    head = eagle3.load_as(PEagleHead, folder, model, load_format)
    head.mask_token = token
    return head
