"""Medusa and Hydra: one small network per draft position, all reading the target's last hidden state.

Medusa's positions know nothing of each other (Cai et al. 2024, arXiv:2401.10774); Hydra's also read the embeddings of
the tokens drafted before (Ankner et al. 2024, arXiv:2402.05109). Both were published with typical acceptance, which is
lossy; here a head's softmax is the draft distribution, and verification is exact.

Formats: FasterDecoding/Medusa (`{i}.{j}.linear.*`, `{i}.{L}.weight`), vLLM's `medusa` (`blocks.*`, `lm_heads.*`), and
Hydra's `hydra_mlp.*`, `hydra_lm_head.*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, silu

from specdec.heads.checkpoints import check_draft_vocabulary
from specdec.heads.files import HeadFolder
from specdec.heads.stateless import StatelessModule, fill
from specdec.models.base import FINAL


class ResidualBlock(nn.Module):
    """x + SiLU(linear(x)); with several inputs, concatenated, a second linear layer in the place of x.

    inputs, outputs: widths. is_projected: whether there is the second layer.
    """

    def __init__(self, inputs: int, outputs: int, *, has_bias: bool = True, is_projected: bool = False) -> None:
        super().__init__()
        self.linear: Any = nn.Linear(inputs, outputs, bias=has_bias)
        self.res_connection: Any = nn.Linear(inputs, outputs) if is_projected else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        kept: Tensor = self.res_connection(x)
        return kept + silu(self.linear(x))


class MedusaHead(StatelessModule):
    """Medusa's networks. The state is the target's last hidden state, whatever has been drafted since.

    target: the transformers model. blocks: residual blocks of each draft position. outputs: its output layer.
    Draft position i predicts the token i + 2 places after the one whose hidden state is read.
    """

    format = "medusa"

    def __init__(
        self,
        target: Any,
        blocks: Sequence[Sequence[ResidualBlock]],
        outputs: Sequence[nn.Linear],
        draft_vocabulary: Tensor | None = None,
    ) -> None:
        super().__init__(target.get_input_embeddings().weight.detach(), len(blocks), draft_vocabulary)
        self.blocks = nn.ModuleList(nn.Sequential(*each) for each in blocks)
        self.outputs = nn.ModuleList(outputs)

    def logits(self, place: int, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of draft position `place` from states [..., width]."""
        logits: Tensor = self.outputs[place](self.blocks[place](states))
        return logits


class HydraHead(MedusaHead):
    """Hydra's perceptrons. The state is the target's hidden state and the embeddings of all tokens after it."""

    format = "hydra"

    def advance(self, place: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States [rows, n, width] and the tokens after them, int64 [rows, n] -> [rows, n, width + hidden]."""
        return torch.cat([states, embedding(tokens, self.embedding)], -1)


def recognize_medusa(folder: HeadFolder) -> str | None:
    """The dialect of a Medusa head's folder, None if it is not one."""
    if "0.0.linear.weight" in folder.shapes:
        return "FasterDecoding"
    return "vLLM" if "blocks.0.layers.0.weight" in folder.shapes else None


def recognize_hydra(folder: HeadFolder) -> str | None:
    """The dialect of a Hydra head's folder, None if it is not one."""
    return "Hydra" if any(name.startswith("hydra_mlp.") for name in folder.shapes) else None


def load_medusa(folder: HeadFolder, target: Any, load_format: str) -> MedusaHead:
    """Load a Medusa head in either dialect. Raises ValueError if its tensors do not fit the target."""
    weights = {_canonical(name): value for name, value in folder.read().items()}
    vocab_size, hidden = target.get_input_embeddings().weight.shape
    vocabulary = None
    if (token_map := weights.pop("token_map", None)) is not None:
        order = token_map.long().argsort()
        vocabulary = check_draft_vocabulary(token_map.long()[order], vocab_size)
        for name in [name for name in weights if name.startswith("outputs.")]:
            rows = token_map.long()[order] if len(weights[name]) > len(order) else order
            weights[name] = weights[name][rows]
    num_places = _count(weights, r"blocks\.(\d+)\.")
    if (shared := weights.pop("outputs.weight", None)) is not None:  # one output layer for all positions
        weights |= {f"outputs.{place}.weight": shared for place in range(num_places)}
    num_blocks, has_bias = _count(weights, r"blocks\.0\.(\d+)\."), "blocks.0.0.linear.bias" in weights
    blocks = [[ResidualBlock(hidden, hidden, has_bias=has_bias) for _ in range(num_blocks)] for _ in range(num_places)]
    num_outputs = vocab_size if vocabulary is None else len(vocabulary)
    outputs = [nn.Linear(hidden, num_outputs, bias=False) for _ in range(num_places)]
    head = MedusaHead(target, blocks, outputs, vocabulary)
    fill(head, weights, folder.path, target, load_format)
    return head


def load_hydra(folder: HeadFolder, target: Any, load_format: str) -> HydraHead:
    """Load a Hydra head of perceptrons. Raises ValueError for another kind, or if it does not fit the target."""
    config, weights = folder.config, folder.read()
    arch, is_grounded = config.get("hydra_head_arch", "mlp"), config.get("grounded_heads", True)
    if arch != "mlp" or not is_grounded:
        raise ValueError(
            f"hydra_head_arch={arch!r} with grounded_heads={is_grounded} of {str(folder.path)!r} must be 'mlp' with "
            "True: the others attend to the whole text; use a head of that kind"
        )
    weights = {
        name.replace("hydra_mlp.", "blocks.").replace("hydra_lm_head.", "outputs."): weights[name] for name in weights
    }
    vocab_size, hidden = target.get_input_embeddings().weight.shape
    num_places, num_blocks = _count(weights, r"blocks\.(\d+)\."), _count(weights, r"blocks\.0\.(\d+)\.")
    blocks = [
        [
            ResidualBlock((place + 2) * hidden, hidden, is_projected=True),
            *(ResidualBlock(hidden, hidden) for _ in range(num_blocks - 1)),
        ]
        for place in range(num_places)
    ]
    outputs = [nn.Linear(hidden, vocab_size, bias="outputs.0.bias" in weights) for _ in range(num_places)]
    head = HydraHead(target, blocks, outputs)
    head.feature_layers = (_feature_layer(config, target),)
    fill(head, weights, folder.path, target, load_format)
    return head


def _canonical(name: str) -> str:
    """A Medusa tensor's name as in `MedusaHead`'s state_dict; a name that is in neither dialect as it is."""
    if match := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(\w+)", name):
        return "blocks.{}.{}.linear.{}".format(*match.groups())
    if match := re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.(\w+)", name):
        return "blocks.{}.{}.linear.{}".format(*match.groups())
    if match := re.fullmatch(r"(\d+)\.\d+\.weight", name):
        return f"outputs.{match[1]}.weight"
    return re.sub(r"^lm_heads?\.", "outputs.", name)


def _count(weights: Iterable[str], pattern: str) -> int:
    """How many numbers a pattern finds at the beginning of names; they are used to make as many modules.

    Raises ValueError if one is missing below the largest: a name could ask for a billion.
    """
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if len(found) <= max(found, default=-1):
        missing = next(number for number in range(len(found) + 1) if number not in found)
        raise ValueError(f"tensors {pattern} must be numbered from 0 without a gap, but {missing} is missing")
    return len(found)


def _feature_layer(config: Mapping[str, Any], target: Any) -> int:
    """The hidden state that Hydra reads: counted from the last one, which is after the final norm."""
    offset = config.get("hidden_state_offset", 0)
    return FINAL if offset == 0 else target.config.get_text_config(decoder=True).num_hidden_layers - offset
