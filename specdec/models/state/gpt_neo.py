"""GPT-Neo's local layers, which build the mask of their window themselves.

transformers builds it by the column of a query in the cache, the same for all rows, and gives all layers one mask.
During a call with a ragged cache, each layer gets its own mask instead.
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


@contextmanager
def own_masks(model: nn.Module, cache: RaggedCache, dtype: torch.dtype) -> Iterator[None]:
    """During calls inside, each attention layer of a GPT-Neo has the cache's mask for it; else nothing changes."""
    layers: list[Any] = [each for each in model.modules() if type(each).__name__ == "GPTNeoSelfAttention"]
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_own_mask(layer, cache, dtype))
        yield


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
