"""ALiBi: attention biases that grow with the position of a key, for rows and token trees of any position.

transformers derives them from a 2-D mask or from the number of cached tokens, the same for all rows. Here each layer of
a forward call gets the biases of the positions of the cache's columns, and the mask of the cache. A bias is a slope per
head times the position of the key: a term that is constant for a query does not change its attention.
Source: Press et al. 2022 (arXiv:2108.12409), section 3; the biases themselves are computed by transformers' models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.models.state.ragged import RaggedCache


@dataclass(frozen=True, slots=True)
class PerRow:
    """A tensor per row for code that expects one without the dimension of rows: indexing returns all of it.

    shape: what the code is to see.
    """

    tensor: Tensor
    shape: tuple[int, ...] = ()

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor


class AlibiBiases:
    """Gives the layers of a model with ALiBi their biases during forward calls with a ragged cache.

    takes_mask: whether the model takes a 4-D mask, which saves it from making one, with a copy from the host.
    """

    def __init__(
        self,
        layers: list[nn.Module],
        of_length: Callable[[int, Any], Tensor],
        inputs: _Inputs,
        *,
        takes_mask: bool = False,
    ) -> None:
        self._layers, self._of_length, self._inputs, self.takes_mask = layers, of_length, inputs, takes_mask

    @contextmanager
    def applied(self, cache: RaggedCache, mask: Tensor) -> Iterator[None]:
        """During calls inside, layers attend to the open window of the cache, whatever mask the model is called with.

        mask: additive, [rows, 1, width, extent].
        """
        seen = cache.seen_positions()
        biases = self._of_length(seen.shape[-1], seen.device)[:, seen[:, 0]].transpose(0, 1).unsqueeze(2)
        given = self._inputs(biases.expand(len(mask), -1, -1, -1), mask)
        hooks = [layer.register_forward_pre_hook(_replacing(given), with_kwargs=True) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_Inputs = Callable[[Tensor, Tensor], dict[str, Any]]
"""(biases [rows, heads, 1, extent], additive mask [rows, 1, width, extent]) -> keyword arguments of a layer."""


def alibi_biases(model: Any) -> AlibiBiases | None:
    """The biases of a model that has ALiBi; None for any other."""
    body = model.base_model
    make = _FAMILIES.get(model.config.model_type)
    return make(body) if make else None


def _bloom(body: Any) -> AlibiBiases:
    def of_length(length: int, device: Any) -> Tensor:
        return _without_rows(body.build_alibi_tensor, length, device, body.num_heads, body.dtype)

    def inputs(biases: Tensor, mask: Tensor) -> dict[str, Any]:
        return {"alibi": biases.flatten(0, 1), "attention_mask": mask}

    return AlibiBiases(list(body.h), of_length, inputs)


def _falcon(body: Any) -> AlibiBiases | None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    if not body.use_alibi:
        return None

    def of_length(length: int, device: Any) -> Tensor:
        return _without_rows(build_alibi_tensor, length, device, body.num_heads, body.dtype)

    def inputs(biases: Tensor, mask: Tensor) -> dict[str, Any]:
        # eager attention adds the biases to the scores and again with the mask; so does the model without a cache
        scaled = biases / math.sqrt(body.config.hidden_size // body.num_heads)
        return {"alibi": biases, "attention_mask": torch.where(mask < 0, mask, scaled)}

    return AlibiBiases(list(body.h), of_length, inputs)


def _mpt(body: Any) -> AlibiBiases:
    def of_length(length: int, device: Any) -> Tensor:
        biases: Tensor = body.build_mpt_alibi_tensor(body.num_heads, length, device=device)
        return biases.flatten(1)

    def inputs(biases: Tensor, mask: Tensor) -> dict[str, Any]:
        return {"position_bias": PerRow(biases, tuple(biases.shape[1:])), "attention_mask": mask < 0}

    return AlibiBiases(list(body.blocks), of_length, inputs, takes_mask=True)


_FAMILIES: dict[str, Callable[[Any], AlibiBiases | None]] = {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}


def _without_rows(build: Callable[..., Tensor], length: int, device: Any, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Biases of positions 0 ... length - 1, [heads, length]."""
    return build(torch.ones(1, length, dtype=torch.int64, device=device), num_heads, dtype).view(num_heads, length)


def _replacing(given: dict[str, Any]) -> Callable[..., Any]:
    return lambda _, args, kwargs: (args, kwargs | given)
