"""EAGLE-3 and EAGLE-3.1 heads: hidden states of several of the target's layers, fused, and layers that read embeddings.

A state is made of the target's features by `fc`. The first layer's attention reads cat[norm(embedding), norm(state)],
which is twice as wide as the residual stream; so does every layer of DeepSpec's heads. The head's output before its
final norm (in EAGLE-3.1: after it) is the next position's state. Sources: Li et al. 2025 (arXiv:2503.01840);
SafeAILab/EAGLE `eagle/model/cnets.py`; vLLM `llama_eagle3.py`; vllm-project/speculators `models/eagle3`;
NVIDIA/Model-Optimizer `hf_spec_export.py`; DeepSpec `modeling/eagle3/qwen3/modeling.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from specdec.heads.base import Choice
from specdec.heads.checkpoints import (
    SHARED,
    Lender,
    Shapes,
    SharedParts,
    Tensors,
    check_feature_layers,
    load_into,
    other_target,
)
from specdec.heads.convention import feature_layer_choice
from specdec.heads.files import HeadFolder
from specdec.heads.sequential import (
    SequentialModule,
    layer_config,
    new_layer,
    new_rotary,
    num_layers_of,
    own_first,
)
from specdec.kernels import cpp
from specdec.models.base import FINAL, FeatureLayers
from specdec.models.fusion import FusedLayer, Norm, Projection, Shared, Stack
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.artifacts import LoadError

_FIRST = "layers.0."
_PLACES = {"before the norm": False, "after the norm": True}
_UNUSED = ("verifier_norm.weight", "verifier_lm_head.weight")  # copies of the target's, for training


@dataclass(frozen=True, slots=True)
class Wiring:
    """How the parts of a head are connected, which its tensors do not show.

    feature_layers: hidden states of the target that `fc` reads; FINAL alone where there is no `fc`.
    norm_before_residual: whether the residual of a wide layer is the normalized state.
    norm_before_output: whether the output head reads normalized states.
    feeds_normed: whether the next state is the normalized one (EAGLE-3.1).
    """

    feature_layers: FeatureLayers
    norm_before_residual: bool = False
    norm_before_output: bool = True
    feeds_normed: bool = False


class WideLayer(nn.Module):
    """A decoder layer whose attention reads the token's embedding beside the state."""

    def __init__(self, layer: Any, hidden_norm: nn.Module, norm_before_residual: bool) -> None:
        super().__init__()
        self.hidden_norm, self.norm_before_residual = hidden_norm, norm_before_residual
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp

    def mix(self, states: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, [..., 2 * width], and the residual, [..., width]."""
        normed = self.hidden_norm(states)
        inputs = torch.cat([self.input_layernorm(embedded), normed], -1)
        return inputs, normed if self.norm_before_residual else states

    def forward(self, states: Tensor, embedded: Tensor, cache: RaggedCache, rotary: Any) -> Tensor:
        inputs, residual = self.mix(states, embedded)
        hidden = residual + self.self_attn(inputs, **_attention(states, cache, rotary))[0]
        mixed: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return mixed


class FusedLayers(nn.Module):
    """A wide layer and the usual ones after it, fused, see `specdec.models.fusion`. rotary: of the head."""

    def __init__(self, wide: WideLayer, others: Sequence[nn.Module], rotary: Any) -> None:
        super().__init__()
        self.norm_before_residual, shared = wide.norm_before_residual, Shared()
        self.hidden_norm, self.input_layernorm = Norm(wide.hidden_norm), Norm(wide.input_layernorm)
        wide.input_layernorm = nn.Identity()  # its inputs are normalized by `mix`
        self.layers = nn.ModuleList(FusedLayer(layer, shared) for layer in (wide, *others))
        has_kernels = all(isinstance(layer.kernel, cpp.Layer) for layer in self.layers)
        self._stack = Stack(list(self.layers), rotary) if has_kernels else None  # type: ignore[arg-type]

    mix = WideLayer.mix

    def forward(self, states: Tensor, embedded: Tensor, cache: RaggedCache, rotary: Any) -> Tensor:
        inputs, residual = self.mix(states, embedded)  # type: ignore[misc]
        if self._stack:
            return self._stack.states(residual, cache, [len(self.layers)], inputs)[0]
        attention, hidden = _attention(states, cache, rotary), residual
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, inputs=None if number else inputs, **attention)
        return hidden


def _attention(states: Tensor, cache: RaggedCache, rotary: Any) -> dict[str, Any]:
    """What a layer needs besides its input, at the open window of the cache."""
    return {
        "attention_mask": cache.mask(states.dtype),
        "position_embeddings": rotary(states, cache.window.positions),
        "past_key_values": cache,
    }


class Eagle3Head(SequentialModule):
    """An EAGLE-3 head on the meta device; `load` fills it. See `Wiring`."""

    format = "eagle3"

    def __init__(self, wiring: Wiring, config: Any, shapes: Shapes, lender: Lender) -> None:
        super().__init__()
        self.num_target_layers, feature_size = lender.num_layers, lender.hidden_size
        self.wiring, self.config, self.feature_layers = wiring, config, wiring.feature_layers
        width, num_states = config.hidden_size, len(wiring.feature_layers)
        self.fc: Any = None
        with torch.device("meta"):
            if "fc.weight" in shapes:
                self.fc = nn.Linear(num_states * feature_size, width, bias="fc.bias" in shapes)
            norm: Any = type(new_layer(config, 0, shapes, _FIRST).input_layernorm)
            self.norm: Any = norm(width, config.rms_norm_eps) if "norm.weight" in shapes else nn.Identity()
            self.input_norm: Any = nn.Identity()
            self.fc_norm = nn.ModuleList()
            if "input_norm.weight" in shapes:
                self.input_norm = norm(num_states * feature_size, config.rms_norm_eps)
            if "fc_norm.0.weight" in shapes:
                self.fc_norm.extend(norm(feature_size, config.rms_norm_eps) for _ in range(num_states))
            self.layers = nn.ModuleList(self._layer(index, shapes, norm) for index in range(num_layers_of(shapes)))
        self.num_layers, self.rotary = len(self.layers), new_rotary(config)

    def _layer(self, index: int, shapes: Shapes, norm: Any) -> nn.Module:
        prefix, width = f"layers.{index}.", self.config.hidden_size
        if not _is_wide(shapes, prefix):
            return new_layer(self.config, index, shapes, prefix)
        has_norm = f"{prefix}hidden_norm.weight" in shapes
        hidden_norm = norm(width, self.config.rms_norm_eps) if has_norm else nn.Identity()
        layer = new_layer(self.config, index, shapes, prefix, 2 * width)
        if f"{prefix}input_layernorm.weight" not in shapes:
            layer.input_layernorm = nn.Identity()
        return WideLayer(layer, hidden_norm, self.wiring.norm_before_residual)

    def allocate(self, num_slots: int, capacity: int) -> RaggedCache:
        return RaggedCache(self.num_layers, num_slots, capacity)

    def encode(self, features: Tensor) -> Tensor:
        """States [..., width] of features [..., states * target's width]: normalized if the head does, and fused."""
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), -1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        features = self.input_norm(features)
        return features if self.fc is None else self.fc(features)

    def run(self, states: Tensor, tokens: Tensor, cache: RaggedCache) -> Tensor:
        """States after the layers; normalized if the head feeds them so."""
        embedded = embedding(tokens, self.embedding).to(states.dtype)
        for layer in self.layers:
            if isinstance(layer, WideLayer | FusedLayers):
                states = layer(states, embedded, cache, self.rotary)
            else:
                states = layer(states, **_attention(states, cache, self.rotary))
        return self.norm(states) if self.wiring.feeds_normed else states

    def normed(self, states: Tensor) -> Tensor:
        """What the output head reads: normalized states, unless the head's wiring says otherwise."""
        needs_norm = self.wiring.norm_before_output and not self.wiring.feeds_normed
        return self.norm(states) if needs_norm else states

    def choices(self) -> tuple[Choice, ...]:
        """The target's layers, which state is fed back, and where the residual is taken."""
        feeds = {label: {"feeds_normed": value} for label, value in _PLACES.items()}
        residual = {label: {"norm_before_residual": value} for label, value in _PLACES.items()}
        choices = [
            feature_layer_choice(self.feature_layers, self.num_target_layers),
            Choice("state fed back", own_first(feeds, {"feeds_normed": self.wiring.feeds_normed})),
        ]
        if any(isinstance(layer, WideLayer) and type(layer.hidden_norm) is not nn.Identity for layer in self.layers):
            own = {"norm_before_residual": self.wiring.norm_before_residual}
            choices.append(Choice("residual", own_first(residual, own)))
        return tuple(choices)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A head with the same weights and other `Wiring`."""
        known = {each.name for each in fields(Wiring)}
        if unknown := sorted(set(options) - known):
            raise ValueError(f"options={unknown} must be of {', '.join(sorted(known))}; measure the convention again")
        layers = tuple(options.get("feature_layers", self.feature_layers))
        if len(layers) != len(self.feature_layers):
            raise ValueError(
                f"feature_layers={list(layers)} must be {len(self.feature_layers)} layers, as many as the head reads; "
                "measure the convention again"
            )
        other = copy(self)
        other._modules = dict(self._modules)
        other.wiring = replace(self.wiring, **{**options, "feature_layers": layers})
        other.feature_layers = layers
        other.layers = nn.ModuleList(map(other._rewired, self.layers))
        return other

    def _rewired(self, layer: Any) -> nn.Module:
        if not isinstance(layer, WideLayer):
            return layer  # type: ignore[no-any-return]
        return WideLayer(layer, layer.hidden_norm, self.wiring.norm_before_residual)

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be saved."""
        self.fuse_output()
        self.fc = None if self.fc is None else Projection(self.fc)
        self.norm, self.input_norm = Norm(self.norm), Norm(self.input_norm)
        self.fc_norm = nn.ModuleList(map(Norm, self.fc_norm))
        layers, wide = list(self.layers), [i for i, each in enumerate(self.layers) if isinstance(each, WideLayer)]
        self.layers = nn.ModuleList(
            FusedLayers(layers[start], layers[start + 1 : end], self.rotary)  # type: ignore[arg-type]
            for start, end in pairwise([*wide, len(layers)])
        )


H = TypeVar("H", bound=Eagle3Head)


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of an EAGLE-3 head's folder, None if it is not one.

    Its tensors tell: queries of the first layer that are made of twice the width, or by latents (MLA) behind a fused
    projection. A head with `mask_hidden` drafts in parallel and is another format's.
    """
    return None if "mask_hidden" in folder.shapes else dialect_of(folder)


def dialect_of(folder: HeadFolder) -> str | None:
    """The dialect of a folder with the layers of an EAGLE-3 head, None if it has none."""
    shapes = _tensors(folder).shapes
    if not (_is_wide(shapes, _FIRST) or _is_latent(shapes)):
        return None
    if "speculators_model_type" in folder.config:
        return "speculators"
    if "target_layer_ids" in folder.config:
        return "DeepSpec"
    if "eagle_config" in folder.config:
        return "ModelOpt"
    return "SafeAILab" if any(name.startswith("midlayer.") for name in folder.shapes) else "SpecForge"


def load(folder: HeadFolder, model: Any, load_format: str) -> Eagle3Head:
    """Load a head for a transformers model, in its dtype and on its device.

    Raises LoadError for a folder that is damaged or of a kind that is not supported, and ValueError for a head of
    another target.
    """
    return load_as(Eagle3Head, folder, model, load_format)


def load_as(kind: type[H], folder: HeadFolder, model: Any, load_format: str) -> H:
    """`load` a head of a kind that has these parts, and perhaps more."""
    lender, tensors, settings = Lender.of(model), _tensors(folder, load_format), _settings(folder)
    shapes = tensors.shapes
    if _is_latent(shapes):
        raise LoadError(
            f"the head {str(folder.path)!r} has latent attention (MLA, as of Eagle3DeepseekV2ForCausalLM), which is "
            'not supported; use a head with layers as Llama has them, or another method, such as "ngram"'
        )
    wiring, config = _wiring(folder, lender, settings), layer_config(settings, shapes, _FIRST)
    parts = SharedParts(tensors, lender, config.hidden_size, bool(settings.get("tie_word_embeddings")))
    parts.check()
    if "fc.weight" not in shapes and config.hidden_size != lender.hidden_size:
        raise other_target("hidden_size", config.hidden_size, lender.hidden_size, folder.path)
    head = kind(wiring, config, shapes, lender)
    load_into(head, tensors.without((*SHARED, *_UNUSED)))
    head.share(*parts.load(), lender.vocab_size)
    return head.placed(model.device, model.dtype).eval().requires_grad_(False)


def _tensors(folder: HeadFolder, load_format: str = "auto") -> Tensors:
    def canonical(name: str) -> str | None:
        key = _FIRST + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
        return None if key.endswith("rotary_emb.inv_freq") else key

    return Tensors.of(folder, canonical, load_format)


def _is_wide(shapes: Shapes, prefix: str) -> bool:
    query, output = (shapes.get(f"{prefix}self_attn.{name}_proj.weight", (0, 0)) for name in ("q", "o"))
    return query[1] == 2 * output[0] > 0


def _is_latent(shapes: Shapes) -> bool:
    return "fc.weight" in shapes and any(key.startswith(f"{_FIRST}self_attn.kv_a_proj") for key in shapes)


def _settings(folder: HeadFolder) -> dict[str, Any]:
    """The head's config, with ModelOpt's keys beside the others."""
    return dict(folder.config.get("eagle_config") or {}) | folder.config


def _wiring(folder: HeadFolder, lender: Lender, config: Mapping[str, Any]) -> Wiring:
    dialect = dialect_of(folder)
    is_speculators = dialect == "speculators"
    # speculators' `norm_output`, and that of EAGLE-3.1, feeds the normalized state back; SpecForge's is the usual norm
    # before the output head, which it can leave out
    normalizes = config.get("norm_output")
    feeds_normed = bool(normalizes) and (is_speculators or bool(config.get("fc_norm")))
    return Wiring(
        _feature_layers(folder, lender, config),
        # vLLM takes a key that is missing in a speculators config for true
        norm_before_residual=bool(config.get("norm_before_residual", is_speculators)),
        norm_before_output=feeds_normed or is_speculators or normalizes is not False,
        feeds_normed=feeds_normed,
    )


def _feature_layers(folder: HeadFolder, lender: Lender, config: Mapping[str, Any]) -> FeatureLayers:
    shapes = _tensors(folder).shapes
    if "fc.weight" not in shapes:
        return (FINAL,)
    num_layers = lender.num_layers
    if (ids := config.get("eagle_aux_hidden_state_layer_ids")) is not None:
        layers = tuple(ids)
    elif (ids := config.get("target_layer_ids")) is not None:
        layers = tuple(index + 1 for index in ids)  # these are of the layers whose output is read
    else:
        layers = (2, num_layers // 2, num_layers - 3)
    check_feature_layers(layers, shapes["fc.weight"][1], lender, folder.path)
    return layers
