"""Heads that are to be trained: of the formats that `specdec.heads` loads, with the dimensions of their target."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config

from specdec.heads import eagle3
from specdec.heads.blocks.backbone import BlockSettings, Sight
from specdec.heads.blocks.dflash import DFlashHead
from specdec.heads.checkpoints import Lender, check_draft_vocabulary
from specdec.heads.eagle3 import Eagle3Head
from specdec.heads.mtp import MtpHead
from specdec.heads.mtp import Wiring as MtpWiring
from specdec.heads.p_eagle import MASK, PEagleHead
from specdec.heads.sequential import HeadModule, config_like
from specdec.models.base import FeatureLayers

H = TypeVar("H", bound=HeadModule)


def new_eagle3(model: Any, layers: FeatureLayers, draft_vocabulary: Tensor, num_layers: int = 1) -> Eagle3Head:
    """An EAGLE-3 head for a transformers model, as SafeAILab's code has it: the residual is the state as it is.

    layers: of the target, whose hidden states it reads. draft_vocabulary: int64, ascending token ids.
    """
    config = config_like(model, num_layers=num_layers)
    head = Eagle3Head(eagle3.Wiring(layers), config, _eagle3_shapes(config), Lender.of(model))
    return _ready(head, model, draft_vocabulary)


def new_p_eagle(
    model: Any, layers: FeatureLayers, draft_vocabulary: Tensor, mask_token: int, num_layers: int = 2
) -> PEagleHead:
    """A P-EAGLE head. mask_token: the token id at the places of masks. Other arguments as for `new_eagle3`."""
    config, lender = config_like(model, num_layers=num_layers), Lender.of(model)
    shapes = _eagle3_shapes(config) | {MASK: (1, 1, len(layers) * lender.hidden_size)}
    head = PEagleHead(eagle3.Wiring(layers), config, shapes, lender)
    head.mask_token = mask_token
    return _ready(head, model, draft_vocabulary)


def new_mtp(model: Any) -> MtpHead:
    """An MTP layer as Qwen's: of the target's own kind, on the embedding and the state after the final norm."""
    lender = Lender.of(model)
    return _ready(MtpHead(MtpWiring(), model, lender), model, torch.arange(lender.vocab_size))


def new_dflash(
    model: Any, layers: FeatureLayers, mask_token: int, block_size: int = 8, num_layers: int = 2
) -> DFlashHead:
    """A DFlash head, with layers like Qwen3's. block_size: the newest token and the tokens to draft."""
    config, lender = config_like(model, Qwen3Config, num_layers), Lender.of(model)
    settings = BlockSettings(layers, mask_token, block_size, False, (Sight(),) * num_layers)
    shapes = {f"layers.{index}.": () for index in range(num_layers)}
    return _ready(DFlashHead(settings, config, shapes, lender), model, torch.arange(lender.vocab_size))


def _eagle3_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Those tensors of an EAGLE-3 checkpoint that tell how it is built."""
    width, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    names = ("fc.weight", "norm.weight", "layers.0.hidden_norm.weight", "layers.0.input_layernorm.weight")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, ())
    for index in range(config.num_hidden_layers):
        inputs = width if index else 2 * width
        shapes[f"layers.{index}.self_attn.q_proj.weight"] = (queries, inputs)
        shapes[f"layers.{index}.self_attn.o_proj.weight"] = (width, queries)
    return shapes


def _ready(head: H, model: Any, draft_vocabulary: Tensor) -> H:
    """A head that is on the meta device with its first weights, in float32 and on the device of the target.

    Its final norm begins as the target's, as the output head is the target's.
    """
    lender = Lender.of(model)
    check_draft_vocabulary(draft_vocabulary, lender.vocab_size)
    tokens = draft_vocabulary.to(model.device)
    head.to_empty(device=model.device)
    for module in head.modules():
        _initialize(module)
    if isinstance(head, PEagleHead):
        nn.init.normal_(head.mask_hidden.requires_grad_(True))
    norm: Any = head.norm
    norm.weight.data.copy_(model.get_decoder().norm.weight)
    head.share(lender.embedding, lender.output[tokens], tokens, lender.vocab_size)
    return head.placed(model.device, torch.float32)


def _initialize(module: Any) -> None:
    """Give a layer of a head its first weights."""
    if isinstance(module, nn.Linear):
        module.reset_parameters()
    elif type(module).__name__.endswith("RMSNorm"):
        with torch.device("cpu"):
            first = type(module)(1).weight.item()  # of some architectures 0: they add it to 1
        nn.init.constant_(module.weight, first)


def train_output(head: HeadModule) -> None:
    """Give a head an output matrix of its own, which is trained; it begins as the target's."""
    output = head._buffers.pop("output")
    assert output is not None, "shared by the target"
    head.output = nn.Parameter(output.float().clone())
