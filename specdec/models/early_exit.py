"""The first layers of a transformers model as a model of their own, over the same weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from specdec.models.fusion import FusedDecoder


def first_layers(module: nn.Module, num_layers: int, kept: int) -> Any:
    """The same module with the first `kept` of its num_layers layers only; None if there is no list of its layers.

    Nothing is copied but references, and fused layers are run as such.
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
    clone._forward_hooks = OrderedDict()  # those of the whole model are not for its beginning
    return clone
