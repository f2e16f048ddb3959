"""Small grouped-query models with random weights, with drafts that are accepted some of the time.

A token's embedding dominates the prediction of the next token, so a perturbed copy, a head that passes the embedding
through, and the first layers all predict well. Attention still matters enough for a wrong cache to change the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCAB = 512
_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Size:
    """Dimensions of a tiny model; hidden = heads * head_dim."""

    kind: str
    head_dim: int
    num_heads: int
    num_kv_heads: int
    num_layers: int = 3

    @property
    def hidden(self) -> int:
        return self.head_dim * self.num_heads


# these cover query and key norms, biases, an odd number of heads and both head sizes
SIZES = {
    "llama": Size("llama", 64, 4, 2),
    "qwen3": Size("qwen3", 32, 4, 2),
    "qwen2": Size("qwen2", 32, 3, 1),
    "mistral": Size("mistral", 32, 8, 2),
}


@dataclass(frozen=True, slots=True)
class Folders:
    """Folders of a saved target and its drafts."""

    target: str
    draft: str
    head: str

    def draft_for(self, method: str) -> str | None:
        return {"draft_model": self.draft}.get(method, self.head if method in ("eagle", "hybrid", "tree") else None)


def save(size: Size, folder: Path) -> Folders:
    """Make the models of a kind on the CPU and save them, in float32."""
    from specdec.models.files.saving import fingerprint

    target = _model(size)
    target.save_pretrained(folder / "target")
    _head(target).save(folder / "head", fingerprint(target), {})
    _disturb(target)
    target.save_pretrained(folder / "draft")
    return Folders(*(str(folder / name) for name in ("target", "draft", "head")))


def _model(size: Size) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"sliding_window": None} if size.kind == "mistral" else {}
    config = AutoConfig.for_model(
        size.kind,
        vocab_size=VOCAB,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        _fill(name, weight.data, generator)
    return model.requires_grad_(False)


def _fill(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    if weight.ndim == 1:
        is_norm = "norm" in name
        weight.copy_(float(is_norm) + 0.1 * torch.randn(weight.shape, generator=generator))
        return
    scale = (
        1.0 if "embed" in name else 3.5 / weight.shape[1] ** 0.5 if "lm_head" in name else _layer_scale(name, weight)
    )
    weight.copy_(scale * torch.randn(weight.shape, generator=generator))


def _layer_scale(name: str, weight: torch.Tensor) -> float:
    """Large queries and keys, for peaked attention; small outputs to the residual stream."""
    gain = {"q_proj": 1.6, "k_proj": 1.6, "o_proj": 0.6, "down_proj": 0.6}.get(name.split(".")[-2], 1.0)
    return gain / math.sqrt(weight.shape[1])


def _disturb(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.add_(0.12 * weight.std() * torch.randn(weight.shape, generator=generator))


def _head(model: Any) -> Any:
    """A head that passes the embedding of the last token on, changed a little by the feature before it."""
    from specdec.heads.eagle import new_head

    head = new_head(model, torch.arange(VOCAB)[torch.arange(VOCAB) % 4 > 0])
    generator, hidden = torch.Generator().manual_seed(3), model.config.hidden_size
    with torch.no_grad():
        for weight in head.parameters():
            if weight.ndim > 1:
                weight.copy_(0.3 / weight.shape[1] ** 0.5 * torch.randn(weight.shape, generator=generator))
        mixing = head.fc.weight
        assert isinstance(head.fc, nn.Linear)
        mixing.mul_(0.2)
        mixing[:, :hidden] += torch.eye(hidden)
    return head
