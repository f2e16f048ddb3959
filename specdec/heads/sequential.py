"""What heads that draft token by token have in common: decoder layers over a cache of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from specdec.heads.base import Drafting, WithoutChoices
from specdec.heads.checkpoints import Shapes
from specdec.models.base import FeatureLayers
from specdec.models.fusion import Projection, weight_bytes
from specdec.models.quantization.model import quantize_layers, quantized
from specdec.models.quantization.quantizers import OF_HEAD
from specdec.models.state.ragged import RaggedCache
from specdec.runtime.artifacts import LoadError
from specdec.trees.columns import Branches
from specdec.trees.optimal import Rates


class HeadModule(WithoutChoices, nn.Module):
    """A `heads.base.Head` with decoder layers that keep their keys and values in a RaggedCache.

    embedding: float [vocab, width] and output: float [draft vocab, width] may be the target's own.
    config: of the layers, a transformers config. rotary: transformers' module of rotary angles.
    quantization: of the output head when it is fused, see `quantize`.
    """

    format: str
    drafting: Drafting
    feature_layers: FeatureLayers
    vocab_size: int
    embedding: Tensor
    output: Tensor
    draft_vocabulary: Tensor
    config: Any
    layers: nn.ModuleList
    rotary: nn.Module
    rates: Rates | None = None
    max_tokens: int | None = None
    output_head: Any  # no default here: a class's attribute would hide the module
    quantization: str | None = None

    def share(self, embedding: Tensor, output: Tensor, draft_vocabulary: Tensor, vocab_size: int) -> None:
        """Set the embedding, the rows of the output head and their token ids, none of which is saved."""
        self.vocab_size, self.output_head = vocab_size, None
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("output", output, persistent=False)
        self.register_buffer("draft_vocabulary", draft_vocabulary, persistent=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.embedding.device

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a step reads: all but the embedding, of which it looks up a few rows."""
        own = [each for name, child in self.named_children() if name != "output_head" for each in child.modules()]
        return weight_bytes(own) + weight_bytes([self.output_head if self.quantization else as_linear(self.output)])

    def project(self, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of states [..., width] that are normalized as the output head wants them."""
        return linear(states, self.output) if self.output_head is None else self.output_head(states)

    def fuse_output(self) -> None:
        """Lay the output head out for decoding."""
        output = as_linear(self.output)
        if self.quantization:
            output = quantized(output, OF_HEAD.get(self.quantization, self.quantization))
        self.output_head = Projection(output)

    def quantize(self, name: str) -> None:
        """Quantize the output head when the head is fused. name: of `quantizers.QUANTIZERS`.

        Raises ValueError without kernels for it.
        """
        self.quantization = name

    def allocate(self, num_slots: int, capacity: int) -> RaggedCache:
        """An empty cache."""
        return RaggedCache(len(self.layers), num_slots, capacity)

    def placed(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move the head to a device and dtype; rotary angles stay float32, which distant positions need."""
        make, self.rotary = type(self.rotary), nn.Identity()
        self.to(device, dtype)
        self.rotary = make(self.config).to(device)
        return self


class SequentialModule(HeadModule, ABC):
    """A `heads.base.SequentialHead`. Cache position i is of token i + 1: the first has no feature before it."""

    drafting: Drafting = "sequential"

    def quantize(self, name: str) -> None:
        """Quantize the decoder layers, too."""
        super().quantize(name)
        quantize_layers(self.layers, name)

    def encode(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    @abstractmethod
    def run(self, states: Tensor, tokens: Tensor, cache: RaggedCache) -> Tensor:
        """`forward` at the open window of the cache."""

    @abstractmethod
    def normed(self, states: Tensor) -> Tensor:
        """What the output head reads, [..., width], of states [..., width] that `forward` returned."""

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of the next token, of states [..., width] that `forward` returned."""
        return self.project(self.normed(states))

    def forward(
        self,
        states: Tensor,
        tokens: Tensor,
        cache: RaggedCache,
        first_slot: int = 0,
        branches: Branches | None = None,
    ) -> Tensor:
        """States of the tokens, [rows, width, state width]. The caller updates the cache's lengths.

        states: of the token before each, of the same shape. tokens: int64 [rows, width].
        Row r belongs to slot first_slot + r. branches: of a tree, as for a LanguageModel.
        """
        rows, width = tokens.shape
        cache.open(first_slot, rows, width, tokens.device, branches)
        return self.run(states, tokens, cache)

    def forward_at(
        self,
        states: Tensor,
        tokens: Tensor,
        starts: Tensor,
        cache: RaggedCache,
        extent: int,
        branches: Branches | None = None,
    ) -> Tensor:
        """`forward` from the first slot on; row r begins at position starts[r] and attends to `extent` positions."""
        cache.open_at(0, starts, tokens.shape[1], extent, branches)
        return self.run(states, tokens, cache)


# ---- decoder layers


_FIELDS = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters"),
)


def layer_config(config: Mapping[str, Any], shapes: Shapes, prefix: str) -> Any:
    """A transformers config of the layers of a checkpoint: Qwen3's if queries are normalized, else Llama's.

    config: of the checkpoint. prefix: of a layer's tensors. Raises LoadError for a config without the sizes.
    """
    known = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if not isinstance(known.get(name), int):
            raise LoadError(f"{name}={known.get(name)!r} in the head's config must be a number; copy the head again")
    known.setdefault("num_key_value_heads", known["num_attention_heads"])
    known.setdefault("head_dim", known["hidden_size"] // known["num_attention_heads"])
    has_norms = f"{prefix}self_attn.q_norm.weight" in shapes
    return (Qwen3Config if has_norms else LlamaConfig)(attn_implementation="sdpa", **known)


def config_like(model: Any, kind: type[LlamaConfig] | type[Qwen3Config] = LlamaConfig, num_layers: int = 1) -> Any:
    """A config of layers of a kind with the dimensions of a transformers model, for a head that is to be trained."""
    config = model.config.get_text_config(decoder=True)
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    names += ["max_position_embeddings", "rope_parameters", "rms_norm_eps"]
    shared = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return kind(num_hidden_layers=num_layers, attn_implementation="sdpa", **shared)


def new_layer(config: Any, index: int, shapes: Shapes, prefix: str, num_inputs: int | None = None) -> nn.Module:
    """A transformers layer on the meta device, with biases where the checkpoint has them.

    num_inputs: width of what queries, keys and values are made of, if it is not that of the hidden states.
    """
    with torch.device("meta"):
        make = Qwen3DecoderLayer if isinstance(config, Qwen3Config) else LlamaDecoderLayer
        layer: nn.Module = make(config, index)
        for name, linear in [each for each in layer.named_modules() if isinstance(each[1], nn.Linear)]:
            wide = num_inputs if num_inputs and name.endswith(("q_proj", "k_proj", "v_proj")) else linear.in_features
            has_bias = f"{prefix}{name}.bias" in shapes
            layer.set_submodule(name, nn.Linear(wide, linear.out_features, bias=has_bias))
    return layer


def new_rotary(config: Any) -> nn.Module:
    """Rotary angles for the layers of a config."""
    rotary: nn.Module = (Qwen3RotaryEmbedding if isinstance(config, Qwen3Config) else LlamaRotaryEmbedding)(config)
    return rotary


def as_linear(weight: Tensor) -> nn.Linear:
    """A linear module of a weight [out, in], which it shares."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def num_layers_of(shapes: Shapes) -> int:
    """Number of layers, which are named layers.0, layers.1, ..."""
    return 1 + max((int(key.split(".")[1]) for key in shapes if key.startswith("layers.")), default=-1)


# ---- what a checkpoint does not reliably tell


M = TypeVar("M", bound=SequentialModule)


def own_first(readings: Mapping[str, Mapping[str, Any]], own: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The same readings, that of the head itself first."""
    return dict(sorted(readings.items(), key=lambda each: dict(each[1]) != dict(own)))


def reading_layers(head: M, options: Mapping[str, Any]) -> M:
    """A shallow copy of a head that reads other layers. options: feature_layers, as many as it reads.

    Raises ValueError for other options, or for another number of layers.
    """
    if set(options) != {"feature_layers"} or len(options["feature_layers"]) != len(head.feature_layers):
        raise ValueError(
            f"options={dict(options)} must be feature_layers, {len(head.feature_layers)} of them; measure the "
            "convention again"
        )
    other = copy(head)
    other.feature_layers = tuple(options["feature_layers"])
    return other
