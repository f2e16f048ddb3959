"""Fused models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kernels import cpp, gpu
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.fusion.anatomy import BODIES, NORMS, is_fusable
from specdec.models.fusion.layers import FusedLayer, Shared
from specdec.models.fusion.parts import Norm, Projection, QuantizedLinear
from specdec.models.fusion.rotary import Rotary
from specdec.models.fusion.stacks import stack_of
from specdec.models.state.ragged import RaggedCache


def fuse(model: Any) -> int:
    """Replace the decoder layers and head of a transformers model by fused ones, in place; returns their number.

    Layers of unsupported architectures are left unchanged. A fused model can no longer be saved or trained. The
    original weights of each layer are freed before the next layer is fused.
    """
    shared, body = Shared(), model.base_model
    num_replaced = _fuse_below(model, model, body, shared)
    layers = getattr(body, "layers", [])
    if type(body).__name__ in BODIES and all(isinstance(layer, FusedLayer) and layer.kernel for layer in layers):
        setattr(model, model.base_model_prefix, FusedDecoder(body))
    return num_replaced


def _fuse_below(parent: Any, model: Any, body: Any, shared: Shared) -> int:
    """Fuse the descendants of a module of the model; returns the number of layers and heads replaced."""
    num_replaced = 0
    for name in [name for name, _ in parent.named_children()]:  # names: a list of the layers would keep their weights
        child = getattr(parent, name)
        if is_fusable(child):
            setattr(parent, name, FusedLayer(child, shared))
            num_replaced += 1
        elif type(child) in (nn.Linear, QuantizedLinear) and parent is model:
            setattr(parent, name, Projection(child, memory=shared.memory))
            num_replaced += 1
        elif type(child).__name__ in NORMS and parent is body:
            setattr(parent, name, Norm(child))
        else:
            num_replaced += _fuse_below(child, model, body, shared)
    return num_replaced


class FusedDecoder(nn.Module):
    """Runs all layers of a model in one call; replaces the transformers model without its head.

    body: the transformers model, after its layers were fused. Called as a module, this object delegates to it.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body, self.layers = body, body.layers
        self._stack = stack_of(list(body.layers), body.rotary_emb)
        self._embedding_scale: float = getattr(body, "embedding_multiplier", 1.0)
        self._logits_divisor: float = getattr(body.config, "logits_scaling", 1.0)
        self._softcap: float | None = getattr(body.config, "final_logit_softcapping", None)

    def forward(self, **options: Any) -> Any:
        return self.body(**options)

    @property
    def widths(self) -> dict[int, int]:
        """The width of each hidden state, by its index as in `FeatureLayers`."""
        return dict.fromkeys(range(FINAL, len(self.layers) + 1), self.body.embed_tokens.weight.shape[1])

    def hidden_states(self, tokens: Tensor, cache: RaggedCache, layers: FeatureLayers = ()) -> dict[int, Tensor]:
        """Hidden states [rows, width, hidden] by index: those of `layers`, and FINAL.

        tokens: int64 [rows, width], in the open window of the cache.
        """
        hidden, num_layers = self.body.embed_tokens(tokens), len(self.layers)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        after = sorted({num_layers, *(layer for layer in layers if layer > 0)})
        if self._stack.supports(tokens.shape[1]):
            states = self._stack.states(hidden, cache, after)
        else:
            states = layer_by_layer(self.layers, self.body.rotary_emb, hidden, cache, after)
        by_index = {0: hidden, **dict(zip(after, states, strict=True))}
        return by_index | {FINAL: self.body.norm(by_index[num_layers])}

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits [..., vocab] of the head's outputs, which some models scale or bound; may overwrite them."""
        if self._logits_divisor != 1.0:
            outputs = outputs / self._logits_divisor
        return outputs if self._softcap is None else softcapped(outputs, self._softcap)


def softcapped(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap), which may overwrite x."""
    return cpp.softcap(x, cap) if cpp.supports(x) and not gpu.on_gpu(x) else cap * torch.tanh(x / cap)


def layer_by_layer(
    layers: Iterable[nn.Module], rotary: Any, hidden: Tensor, cache: RaggedCache, after: Sequence[int]
) -> list[Tensor]:
    """Run the layers without kernels on hidden states [rows, width, hidden] in the cache's open window.

    Returns the hidden states after the first n layers for each n of `after`, ascending.
    """
    layers = list(layers)
    angles, states = Rotary(rotary, layers).angles(hidden, cache.window.positions), []
    for number, (layer, of_layer, local) in enumerate(zip(layers, angles, cache.local, strict=False), 1):
        mask = cache.mask(hidden.dtype, local)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=of_layer, past_key_values=cache)
        if number in after:
            states.append(hidden)
    return states
