"""GPT-Neo's local layers, which build the mask of their window themselves.

transformers builds the mask from the column of a query in the cache, the same for all rows, and gives all layers one
mask. During a call with a ragged cache, each layer gets its own mask instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from specdec.models.state.ragged import RaggedCache
from specdec.models.state.windows import LocalAttention


def local_layers(config: Any) -> tuple[LocalAttention | None, ...]:
    """The window of each layer of a GPT-Neo, None for global attention."""
    local = LocalAttention(config.window_size)
    return tuple(local if kind == "local" else None for kind in config.attention_layers)


class OwnMasks:
    """The attention layers of a GPT-Neo, each of which gets the cache's mask for it during calls with a ragged cache.

    layers: its self-attention modules.
    """

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers

    @contextmanager
    def applied(self, cache: RaggedCache, dtype: torch.dtype) -> Iterator[None]:
        """During calls inside, layers attend to the open window of the cache; dtype: of the masks."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(_own_mask(layer, cache, dtype))
            yield


def own_masks(model: nn.Module) -> OwnMasks | None:
    """The attention layers of a GPT-Neo; None for any other model."""
    layers = [each for each in model.modules() if type(each).__name__ == "GPTNeoSelfAttention"]
    return OwnMasks(layers) if layers else None


@contextmanager
def _own_mask(layer: Any, cache: RaggedCache, dtype: torch.dtype) -> Iterator[None]:
    def give(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, options | {"attention_mask": cache.mask(dtype, cache.local[layer.layer_id])}

    built_in = layer.bias
    layer.bias = torch.ones(1, dtype=torch.bool, device=built_in.device).expand(1, 1, cache.capacity, cache.capacity)
    hook = layer.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        layer.bias = built_in
