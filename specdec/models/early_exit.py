"""A transformers model cut to its first layers, sharing the weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from specdec.models.fusion import FusedDecoder


def first_layers(module: nn.Module, num_layers: int, kept: int) -> Any:
    """The module with only the first `kept` of its num_layers layers; None if it has no list of layers.

    Weights are shared, and fused layers stay fused.
    """
    if isinstance(module, FusedDecoder):
        body = first_layers(module.body, num_layers, kept)
        return body and FusedDecoder(body)
    shorter = {
        name: nn.ModuleList(child[:kept])
        if isinstance(child, nn.ModuleList) and len(child) == num_layers
        else first_layers(child, num_layers, kept)
        for name, child in module.named_children()
    }
    replaced = {name: child for name, child in shorter.items() if child is not None}
    if not replaced:
        return None
    clone = copy.copy(module)
    clone._modules = {**module._modules, **replaced}
    clone._forward_hooks = OrderedDict()  # the hooks belong to the full model
    return clone
