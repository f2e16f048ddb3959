"""Protocol of the decoder of an encoder-decoder model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from specdec.models.state.ragged import RaggedCache

KeysValues = tuple[Tensor, Tensor]


class Decoder(Protocol):
    """A decoder over a ragged cache of its own tokens and the keys and values of encoded prompts.

    num_layers: with a cache. context_length: maximum length of an output, and of a prompt.
    """

    num_layers: int
    context_length: int

    def encode(self, prompt: Tensor) -> Sequence[KeysValues]:
        """The keys and values by layer, [heads, tokens, head_dim] each, of one prompt, int64 [1, tokens]."""
        ...

    def logits(
        self, tokens: Tensor, cache: RaggedCache, prompts: Sequence[KeysValues], mask: Tensor, keep: int | Tensor
    ) -> Tensor:
        """Logits of tokens [rows, width] in the cache's open window: of the last `keep` (0 for all), or at `keep`.

        prompts: by layer, [rows, heads, longest, head_dim] each. mask: additive, [rows, 1, 1, longest].
        """
        ...
