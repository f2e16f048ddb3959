"""Experts that a step of a mixture-of-experts model reads.

A token reads the few experts that it is routed to. Several tokens in one call are routed to different experts, so
verifying k + 1 tokens reads more weights than decoding one, which dense models do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """Experts that a call reads, summed over the model's layers, of `num_experts` that there are in all of them.

    bytes_read, bytes_stored: of these experts' weights, and of all experts' weights.
    """

    num_read: int
    num_experts: int
    bytes_read: int
    bytes_stored: int


def count_reads(model: nn.Module, call: Callable[[], object]) -> ExpertReads | None:
    """The experts that a call of a transformers model reads; None if the model has none.

    call: runs the model once, not as a CUDA graph.
    """
    layers = [*_expert_layers(model)]
    if not layers:
        return None
    routed: dict[nn.Module, Tensor | None] = {}

    def record(module: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        tensors = [each for each in (*arguments, *keywords.values()) if isinstance(each, Tensor)]
        routed[module] = next((each for each in tensors if not each.is_floating_point()), None)

    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    read = [_num_read(layer, routed.get(layer)) for layer in layers]
    stored = [_bytes(layer) for layer in layers]
    sizes = [int(layer.num_experts) for layer in layers]
    each = [num_bytes // size for num_bytes, size in zip(stored, sizes, strict=True)]
    bytes_read = sum(number * size for number, size in zip(read, each, strict=True))
    return ExpertReads(sum(read), sum(sizes), bytes_read, sum(stored))


def _expert_layers(model: nn.Module) -> Iterator[Any]:
    """The modules with the stacked weights of a layer's experts [num_experts, ...]."""
    for module in model.modules():
        if isinstance(getattr(module, "num_experts", None), int) and _stacked(module):
            yield module


def _stacked(module: Any) -> list[Tensor]:
    own = module.parameters(recurse=False)
    return [weight for weight in own if weight.dim() == 3 and len(weight) == module.num_experts]


def _bytes(layer: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in _stacked(layer))


def _num_read(layer: Any, routed: Tensor | None) -> int:
    """Distinct experts among those that tokens were routed to; all of them for a layer that is not given a choice."""
    if routed is None:
        return int(layer.num_experts)
    return int((routed.unique() < layer.num_experts).sum())  # the index beyond the last is of padding
