"""The positions of the tokens of each row, in the form that a decoder-only model takes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from specdec.models.positions.alibi import alibi_biases
from specdec.models.positions.embeddings import PositionEmbeddings, ids_after_padding
from specdec.models.positions.gpt_neo import own_masks
from specdec.models.state.ragged import RaggedCache

Masks = Tensor | dict[str, Tensor | None]  # one for all layers, or one by kind of layer


class RowPositions:
    """The inputs by which a transformers causal language model learns positions and what each token attends to.

    first: the id of the first position, which shortens the context by as much: 0 except for RoBERTa and its variants,
    whose ids begin after that of the padding token.
    """

    def __init__(self, model: Any) -> None:
        self._padding = _padding(model)
        self.first = 0 if self._padding is None else self._padding + 1
        takes_ids = "position_ids" in inspect.signature(model.forward).parameters
        self._embeddings = None if takes_ids else PositionEmbeddings(model.get_decoder())
        self._alibi, self._own_masks = alibi_biases(model), own_masks(model)
        self._dtype = model.dtype

    def without_padding(self, tokens: list[int]) -> list[int]:
        """The tokens with another in place of the padding token where the model gives that no position."""
        padding = self._embeddings.padding if self._embeddings else self._padding
        other = 0 if padding else 1
        return [other if token == padding else token for token in tokens]

    @contextmanager
    def applied(self, tokens: Tensor, positions: Tensor, cache: RaggedCache, mask: Masks) -> Iterator[dict[str, Any]]:
        """Arguments of the model's forward call inside, for tokens in the cache's open window at these positions.

        tokens, positions: int64 [rows, width]. mask: additive, of that window, as the model takes it.
        """
        if self._alibi:
            assert isinstance(mask, Tensor), "no model with ALiBi has windows"
            with self._alibi.applied(cache, mask):
                yield {"attention_mask": mask} if self._alibi.takes_mask else {}
        elif self._embeddings:
            with self._embeddings.applied(tokens, positions):
                yield {"attention_mask": mask}
        else:
            ids = positions if self._padding is None else ids_after_padding(tokens, positions, self._padding)
            with self._own_masks.applied(cache, self._dtype) if self._own_masks else nullcontext():
                yield {"attention_mask": mask, "position_ids": ids}


def _padding(model: Any) -> int | None:
    """The padding token of a model whose position ids begin after it; None for any other."""
    embeddings: Any = getattr(model.base_model, "embeddings", None)
    if not hasattr(embeddings, "create_position_ids_from_input_ids"):
        return None
    padding: int | None = embeddings.padding_idx
    return padding
