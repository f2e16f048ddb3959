"""What heads that draft a block in one pass have in common: the backbone of DFlash.

A context state, hidden_norm(fc(features)), stands for each committed position. Every layer makes its keys and values of
it directly, without its input norm, and keeps them at the position: the context is the same for all layers and does not
change from step to step. The block follows, [newest token, mask, mask, ...], and its tokens attend to the context and
to each other, both ways; their keys and values are dropped after the pass.

Sources: Chen et al. 2026 (arXiv:2602.06036); z-lab/dflash `dflash/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from specdec.heads.base import Choice, Drafting
from specdec.heads.checkpoints import Lender, Shapes
from specdec.heads.convention import feature_layer_choice
from specdec.heads.sequential import HeadModule, new_layer, new_rotary, num_layers_of
from specdec.models.base import FeatureLayers
from specdec.models.fusion import FusedLayer, Projection, Shared, Stack, rotate, stack_of
from specdec.models.state.ragged import RaggedCache


@dataclass(frozen=True, slots=True)
class Sight:
    """What the tokens of a block attend to in a layer.

    is_causal: only to tokens before them and to themselves. window: only to this many newest positions, None for all.
    """

    is_causal: bool = False
    window: int | None = None


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """What a checkpoint says beside its tensors.

    feature_layers: hidden states of the target that `fc` reads. mask_token: the token id at the places to draft.
    block_size: tokens of a block. drafts_at_anchor: whether the newest token's place drafts the token after it, and the
    first mask the second; else the first mask drafts the first. sights: of each layer.
    """

    feature_layers: FeatureLayers
    mask_token: int
    block_size: int
    drafts_at_anchor: bool
    sights: tuple[Sight, ...]

    @property
    def max_tokens(self) -> int:
        """Tokens that a block drafts."""
        return self.block_size - (not self.drafts_at_anchor)


@dataclass(slots=True)
class Block:
    """A pass over a block. hidden: float [rows, tokens, width], normalized, of the places that draft.

    logits: float [rows, tokens, draft vocab], before any correction by the tokens drafted. memory: states after 0, 1,
    ... drafted tokens, of formats that have such.
    """

    hidden: Tensor
    logits: Tensor
    memory: list[Tensor] = field(default_factory=list)


class BlockModule(HeadModule):
    """A `heads.base.BlockHead` on the meta device; loading fills it. Without more it is DFlash.

    config: of the layers. shapes: of the checkpoint's tensors. lender: the target.
    """

    drafting: Drafting = "block"
    max_tokens: int

    def __init__(self, settings: BlockSettings, config: Any, shapes: Shapes, lender: Lender) -> None:
        super().__init__()
        self.settings, self.config, self.feature_layers = settings, config, settings.feature_layers
        self.num_target_layers, self.max_tokens = lender.num_layers, settings.max_tokens
        width, num_states = config.hidden_size, len(settings.feature_layers)
        with torch.device("meta"):
            self.fc: Any = nn.Linear(num_states * lender.hidden_size, width, bias="fc.bias" in shapes)
            first = new_layer(config, 0, shapes, "layers.0.")
            norm: Any = type(first.input_layernorm)
            self.hidden_norm, self.norm = (norm(width, config.rms_norm_eps) for _ in range(2))
            self.layers = nn.ModuleList(self.layer(index, shapes) for index in range(num_layers_of(shapes)))
        self.rotary = new_rotary(config)
        self._context: Projection | None = None  # keys and values of all layers in one product
        self._stack: Stack | None = None

    def configure(self, folder: Any) -> None:
        """Read further settings of a HeadFolder. Raises LoadError for missing ones."""
        return

    def layer(self, index: int, shapes: Shapes) -> nn.Module:
        """A layer, on the meta device."""
        return new_layer(self.config, index, shapes, f"layers.{index}.")

    def choices(self) -> tuple[Choice, ...]:
        """The target's layers that it reads."""
        return (feature_layer_choice(self.feature_layers, self.num_target_layers),)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A head with the same weights that reads other layers. Raises ValueError for other options."""
        if set(options) - {"feature_layers"} or len(options.get("feature_layers", self.feature_layers)) != len(
            self.feature_layers
        ):
            raise ValueError(
                f"options={dict(options)} must be feature_layers, {len(self.feature_layers)} of them; measure the "
                "convention again"
            )
        other = copy(self)
        other._modules = dict(self._modules)
        other.feature_layers = tuple(options.get("feature_layers", self.feature_layers))
        return other

    # ---- the context

    def extend(self, features: Tensor, tokens: Tensor, cache: RaggedCache, first_slot: int = 0) -> None:
        """Enter committed positions: features [rows, width, ...] of positions, and the tokens after them, not read.

        Row r belongs to slot first_slot + r. The caller updates the cache's num_cached.
        """
        cache.open(first_slot, features.shape[0], features.shape[1], features.device)
        self.enter(features, cache)

    def extend_at(self, features: Tensor, tokens: Tensor, starts: Tensor, cache: RaggedCache, extent: int) -> None:
        """`extend` from the first slot on; row r begins at position starts[r]. extent: bounds all positions."""
        cache.open_at(0, starts, features.shape[1], extent)
        self.enter(features, cache)

    def enter(self, features: Tensor, cache: RaggedCache) -> None:
        """`extend` in the open window of the cache."""
        states = self.hidden_norm(self.fc(features))
        dim = _attention(self.layers[0]).head_dim
        heads = self._keys_and_values(states).unflatten(-1, (2 * len(self.layers), -1, dim)).transpose(1, 3)
        cos, sin = self.rotary(states, cache.window.positions)
        for index, layer in enumerate(self.layers):
            keys, values = heads[:, :, 2 * index], heads[:, :, 2 * index + 1]
            normed = getattr(_attention(layer), "k_norm", nn.Identity())
            cache.update(rotate(normed(keys), cos, sin), values, index)

    def _keys_and_values(self, states: Tensor) -> Tensor:
        """Of the context, [rows, width, layers * 2 * kv heads * head dim], layer by layer."""
        if self._context is not None:
            joint: Tensor = self._context(states)
            return joint
        return torch.cat([project(states) for project in self._context_projections()], -1)

    def _context_projections(self) -> list[nn.Linear]:
        """Of keys and values, layer by layer."""
        attentions: list[Any] = [layer.self_attn for layer in self.layers]
        return [project for attention in attentions for project in (attention.k_proj, attention.v_proj)]

    # ---- the block

    def block(self, newest: Tensor, num_tokens: int, cache: RaggedCache) -> Block:
        """One pass for num_tokens drafts after each row's newest token, int64 [rows]."""
        tokens = self.block_tokens(newest, num_tokens)
        cache.open(0, tokens.shape[0], tokens.shape[1], tokens.device)
        return self._run(tokens, num_tokens, cache)

    def block_at(self, newest: Tensor, num_tokens: int, starts: Tensor, cache: RaggedCache, extent: int) -> Block:
        """`block`, where the newest tokens are at positions starts, int64 [rows]. extent: bounds all positions."""
        tokens = self.block_tokens(newest, num_tokens)
        cache.open_at(0, starts, tokens.shape[1], extent)
        return self._run(tokens, num_tokens, cache)

    def block_tokens(self, newest: Tensor, num_tokens: int) -> Tensor:
        """Newest tokens, int64 [rows], each followed by the masks of num_tokens drafts, int64 [rows, width]."""
        num_masks = num_tokens - self.settings.drafts_at_anchor
        return pad(newest.unsqueeze(1), (0, num_masks), value=self.settings.mask_token)

    def _run(self, tokens: Tensor, num_tokens: int, cache: RaggedCache) -> Block:
        hidden = self.norm(self.run_layers(self.embed(tokens), cache)[:, -num_tokens:])
        return Block(hidden, self.base_logits(hidden))

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, [rows, width, hidden], of tokens int64 [rows, width]."""
        return embedding(tokens, self.embedding)

    def run_layers(self, hidden: Tensor, cache: RaggedCache) -> Tensor:
        """Run the layers on the block [rows, width, hidden], in the open window of the cache."""
        if self._stack is not None:
            return self._stack.both_ways(hidden, cache)
        masks = {sight: _mask(sight, cache, hidden.dtype) for sight in set(self.settings.sights)}
        return self.attend(hidden, cache, masks)

    def attend(self, hidden: Tensor, cache: RaggedCache, masks: Mapping[Sight, Tensor]) -> Tensor:
        """`run_layers` without kernels. masks: [rows, 1, width, extent], by what a layer attends to."""
        angles = self.rotary(hidden, cache.window.positions)
        for layer, sight in zip(self.layers, self.settings.sights, strict=True):
            hidden = layer(hidden, attention_mask=masks[sight], position_embeddings=angles, past_key_values=cache)
        return hidden

    def base_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., draft vocab] of normalized states [..., hidden], before corrections."""
        return self.project(hidden)

    def logits(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor:
        """Logits [rows, 1, draft vocab] of the next draft token; here they do not depend on those drafted before."""
        place = drafted.shape[1]
        return block.logits[:, place : place + 1]

    def confidence(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor | None:
        """Probability, float32 [rows], that the next draft token will be accepted; None: the head does not tell."""
        return None

    # ---- decoding

    def fuse(self) -> None:
        """Fuse operations, see `specdec.models.fusion`. A fused head can no longer be saved."""
        self._context = Projection(*self._context_projections())
        self.fc = Projection(self.fc)
        self.fuse_output()
        self.fuse_layers()

    def fuse_layers(self) -> None:
        """Fuse the layers, and run them as one call of the CPU kernels where these can attend as the layers do."""
        shared = Shared()
        layers = [FusedLayer(layer, shared) for layer in self.layers]
        self.layers = nn.ModuleList(layers)
        if all(layer.kernel for layer in layers) and set(self.settings.sights) == {Sight()}:
            stack = stack_of(layers, self.rotary)
            self._stack = stack if isinstance(stack, Stack) else None


def _attention(layer: Any) -> Any:
    """What has a layer's size of heads and norm of keys."""
    return layer if isinstance(layer, FusedLayer) else layer.self_attn


def _mask(sight: Sight, cache: RaggedCache, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [rows, 1, width, extent] of a block: 0 where attended, else the minimum."""
    window = cache.window
    places, own = torch.arange(window.extent, device=window.positions.device), window.positions.unsqueeze(-1)
    hidden = places > (own if sight.is_causal else own[:, -1:])
    if sight.window is not None:
        hidden = hidden | (places <= own - sight.window)
    mask = torch.zeros(len(own), own.shape[1], window.extent, dtype=dtype, device=places.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min).unsqueeze(1)
