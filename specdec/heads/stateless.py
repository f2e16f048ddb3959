"""What heads without a cache share: the target's embedding, and a draft vocabulary that may be smaller."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.heads.base import Drafting, WithoutChoices
from specdec.heads.checkpoints import check_shapes
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.fusion import Projection, weight_bytes
from specdec.models.quantization.model import quantized
from specdec.trees.optimal import Rates


class StatelessModule(WithoutChoices, nn.Module, ABC):
    """A `StatelessHead` with one set of weights per draft position.

    embedding: float [vocab, hidden], the target's. max_tokens: draft positions.
    draft_vocabulary: int64 [n], ascending, the tokens of the output layers' rows; None: all of the target's.
    """

    format: str
    drafting: Drafting = "stateless"
    feature_layers: FeatureLayers = (FINAL,)
    embedding: Tensor
    draft_vocabulary: Tensor

    def __init__(self, embedding: Tensor, max_tokens: int, draft_vocabulary: Tensor | None = None) -> None:
        super().__init__()
        vocabulary = torch.arange(len(embedding)) if draft_vocabulary is None else draft_vocabulary
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("draft_vocabulary", vocabulary.to(embedding.device), persistent=False)
        self.max_tokens: int | None = max_tokens
        self.rates: Rates | None = None

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        return len(self.embedding)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that drafting max_tokens tokens reads; tables of embeddings are looked up, not read."""
        return weight_bytes(module for module in self.modules() if not isinstance(module, nn.Embedding))

    def fuse(self) -> None:
        """Pack linear layers for decoding."""
        for parent in [module for module in self.modules() if not isinstance(module, Projection)]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Projection(child))

    def quantize(self, name: str) -> None:
        """Quantize all linear layers."""
        for path, module in list(self.named_modules()):
            if type(module) is nn.Linear:
                parent, _, attribute = path.rpartition(".")
                setattr(self.get_submodule(parent), attribute, quantized(module, name, path))

    def start(self, features: Tensor) -> Tensor:
        """States [rows, 1, width] of features [rows, 1, hidden]."""
        return features

    def advance(self, place: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States [rows, n, width] once more tokens are known, int64 [rows, n]; here they are not read."""
        return states

    @abstractmethod
    def logits(self, place: int, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of draft position `place` from states [..., width]."""


def fill(head: StatelessModule, weights: Mapping[str, Tensor], source: Path, target: Any, load_format: str) -> None:
    """Give a head these weights, the target's dtype and its device.

    weights: by name in the head's state_dict. load_format: "dummy" leaves the random ones that it has.
    Raises LoadError for a tensor that is missing, unknown or of another shape.
    """
    check_shapes(head, {name: tuple(value.shape) for name, value in weights.items()}, source)
    if load_format != "dummy":
        head.load_state_dict(weights, assign=True)
    head.to(target.device, target.dtype).eval().requires_grad_(False)
