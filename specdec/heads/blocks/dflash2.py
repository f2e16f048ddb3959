"""DFlash2: DFlash with short convolutions around attention and MLP, and a selector among the likeliest tokens.

A convolution runs over the block, each place reading itself and those before it, per channel: its weights are a fixed
kernel plus one that is computed of the place's input, the same for all channels of a group. One convolution is before
attention or MLP, another, whose weights come of the same input, after it.

Of each place, the K likeliest tokens by the output head are candidates. The score of one is its logit plus
<predecessor[x] * projection(h), successor[candidate]>, x being the token before the place and h its hidden state.
A draft token is drawn from the softmax of these K scores, which is its exact distribution given the token before.
Source: vLLM `qwen3_dflash2.py` (vllm-project/vllm#52816).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from specdec.heads.blocks.backbone import Block, BlockModule
from specdec.heads.blocks.checkpoints import dialect_of, is_block, load_block, required, setting, tensors_of
from specdec.heads.files import HeadFolder
from specdec.models.fusion import Projection
from specdec.runtime.artifacts import LoadError

_FIRST = "candidate_selector.predecessor_codebook"
_OUTSIDE = -1e9  # gives probability 0 to other tokens, but stays finite in case no candidate is allowed


class Convolution(nn.Module):
    """Both convolutions of a sublayer. num_taps: places each reads. group: channels that share computed weights."""

    def __init__(self, width: int, num_taps: int, group: int) -> None:
        super().__init__()
        self.num_taps, self.num_groups = num_taps, width // group
        self.base_kernel = nn.Parameter(torch.empty(2, num_taps, width))
        self.kernel_projection: Any = nn.Linear(width, 2 * num_taps * self.num_groups, bias=False)

    def before(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The sublayer's input [rows, n, width], and the computed weights for `after`."""
        kernels = self.kernel_projection(inputs).unflatten(-1, (2, self.num_taps, self.num_groups))
        return self._convolved(inputs, kernels[:, :, 0], 0), kernels[:, :, 1]

    def after(self, outputs: Tensor, kernels: Tensor) -> Tensor:
        """The sublayer's output, [rows, n, width] -> the same."""
        return self._convolved(outputs, kernels, 1)

    def _convolved(self, x: Tensor, kernels: Tensor, side: int) -> Tensor:
        group = x.shape[-1] // self.num_groups
        weights = self.base_kernel[side] + kernels.repeat_interleave(group, -1)  # [rows, n, taps, width]
        shifted = [pad(x, (0, 0, tap, 0))[:, : x.shape[1]] for tap in range(self.num_taps)]
        return (weights * torch.stack(shifted, 2)).sum(2)


class ConvolvedLayer(nn.Module):
    """A decoder layer with convolutions."""

    def __init__(self, layer: Any, num_taps: int, group: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        width = layer.hidden_size
        self.attention_conv, self.mlp_conv = (Convolution(width, num_taps, group) for _ in range(2))

    def forward(self, hidden: Tensor, **attention: Any) -> Tensor:
        inputs, kernels = self.attention_conv.before(self.input_layernorm(hidden))
        hidden = hidden + self.attention_conv.after(self.self_attn(inputs, **attention)[0], kernels)
        inputs, kernels = self.mlp_conv.before(self.post_attention_layernorm(hidden))
        return hidden + self.mlp_conv.after(self.mlp(inputs), kernels)


class CandidateSelector(nn.Module):
    """The selector's weights."""

    def __init__(self, vocab_size: int, rank: int, width: int) -> None:
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab_size, rank))
        self.hidden_projection: Any = nn.Linear(width, rank, bias=False)


class DFlash2Head(BlockModule):
    """A DFlash2 head. num_candidates: of each place."""

    format = "dflash2"
    candidate_selector: CandidateSelector
    num_candidates: int = 1
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    softcap: float | None = None

    def configure(self, folder: HeadFolder) -> None:
        width, num_taps, group = self.config.hidden_size, *_convolution(folder)
        if width % group:
            raise LoadError(
                f"conv_group_size={group} of the head {str(folder.path)!r} must divide hidden_size={width}; copy the "
                "head again"
            )
        self.num_candidates = required(folder, "selector_top_k", 1)
        self.embedding_scale = float(setting(folder, "input_embedding_scale", 1.0))
        self.output_scale = float(setting(folder, "output_multiplier", 1.0))
        self.softcap = setting(folder, "final_logit_softcapping")
        vocab_size, rank = tensors_of(folder).shapes[_FIRST][0], required(folder, "selector_rank", 1)
        with torch.device("meta"):
            self.layers = nn.ModuleList(ConvolvedLayer(layer, num_taps, group) for layer in self.layers)
            self.candidate_selector = CandidateSelector(vocab_size, rank, width)

    def embed(self, tokens: Tensor) -> Tensor:
        return super().embed(tokens) * self.embedding_scale

    def base_logits(self, hidden: Tensor) -> Tensor:
        logits = super().base_logits(hidden) * self.output_scale
        return (logits / self.softcap).tanh() * self.softcap if self.softcap else logits

    def logits(self, block: Block, newest: Tensor, drafted: Tensor) -> Tensor:
        """Logits [rows, 1, draft vocab] of the next draft token: scores of the candidates, and none of others."""
        place, selector = drafted.shape[1], self.candidate_selector
        logits, hidden = block.logits[:, place], block.hidden[:, place]
        unary, candidates = logits.topk(min(self.num_candidates, logits.shape[-1]), -1)
        before = torch.cat([newest.unsqueeze(1), drafted], 1)[:, -1]
        reads = embedding(before, selector.predecessor_codebook) * selector.hidden_projection(hidden)
        successors = embedding(self.draft_vocabulary[candidates], selector.successor_codebook)
        scores = unary + (reads.unsqueeze(1) * successors).sum(-1)
        return torch.full_like(logits, _OUTSIDE).scatter(-1, candidates, scores).unsqueeze(1)

    def fuse_layers(self) -> None:
        """Lay out linear layers for decoding."""
        for parent in [module for module in self.modules() if not isinstance(module, Projection)]:
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Projection(child))


def _convolution(folder: HeadFolder) -> tuple[int, int]:
    """Number of taps and size of groups."""
    return required(folder, "conv_kernel_size", 1), required(folder, "conv_group_size", 1)


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of a DFlash2 head's folder, None if it is not one."""
    return dialect_of(folder) if is_block(folder) and _FIRST in tensors_of(folder).shapes else None


def load(folder: HeadFolder, model: Any, load_format: str) -> DFlash2Head:
    """See `load_block`."""
    return load_block(folder, model, load_format, DFlash2Head)
