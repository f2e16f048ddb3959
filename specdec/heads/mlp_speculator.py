"""MLP speculator: a small recurrent state, started by the target's hidden state and advanced by each token.

Source: Wertheimer et al. 2024 (arXiv:2404.19124); the format of the ibm-fms accelerators:
    state <- GELU(norm(projection(state) * sw + embedding(token) * ew)), logits = output(state),
with sw = 0.5 ** (0.5 / n) and ew = sqrt((1 - sw ** 2) * inner / 2) for n draft positions.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from specdec.heads.files import HeadFolder
from specdec.heads.stateless import StatelessModule, fill

_EPSILON = 1e-6


class ScaledNorm(nn.Module):
    """Root mean square normalization with a scale and a shift."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return _normalized(x) * self.weight + self.bias


class MlpSpeculator(StatelessModule):
    """The speculator. Its draft positions have weights of their own, or share them (`is_tied`).

    hidden: width of the target's hidden state. inner: width of the state. scales_input: whether the hidden state is
    normalized and divided by sqrt(2) first.
    """

    format = "mlp_speculator"

    def __init__(
        self, target: Any, max_tokens: int, inner: int, *, is_tied: bool = False, scales_input: bool = False
    ) -> None:
        table: Tensor = target.get_input_embeddings().weight.detach()
        (vocab_size, hidden), num_sets = table.shape, 1 if is_tied else max_tokens
        super().__init__(table, max_tokens)
        self.scales_input, self.inner = scales_input, inner
        self.emb = nn.ModuleList(nn.Embedding(vocab_size, inner) for _ in range(num_sets))
        num_projections = min(max_tokens, 2) if is_tied else max_tokens  # the first reads the target's width
        self.proj = nn.ModuleList(
            nn.Linear(inner if place else hidden, inner, bias=False) for place in range(num_projections)
        )
        self.head = nn.ModuleList(nn.Linear(inner, vocab_size, bias=False) for _ in range(num_sets))
        self.ln = nn.ModuleList(ScaledNorm(inner) for _ in range(num_sets))
        self.state_weight = 0.5 ** (0.5 / max_tokens)
        self.embedding_weight = math.sqrt((1 - self.state_weight**2) * inner / 2)

    def start(self, features: Tensor) -> Tensor:
        """[rows, 1, hidden], scaled if this speculator scales its input."""
        return _normalized(features) / math.sqrt(2) if self.scales_input else features

    def advance(self, place: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States [rows, n, inner], at place 0 [rows, 1, hidden], and tokens int64 [rows, n] -> [rows, n, inner]."""
        projected = _at(self.proj, place)(states) * self.state_weight
        mixed: Tensor = _at(self.ln, place)(projected + _at(self.emb, place)(tokens) * self.embedding_weight)
        return gelu(mixed)

    def logits(self, place: int, states: Tensor) -> Tensor:
        """Logits [..., vocab] of draft position `place` from states [..., inner]."""
        logits: Tensor = _at(self.head, place)(states)
        return logits


def recognize(folder: HeadFolder) -> str | None:
    """The dialect of an MLP speculator's folder, None if it is not one."""
    return "ibm-fms" if {"emb.0.weight", "proj.0.weight", "ln.0.weight"} <= folder.shapes.keys() else None


def load(folder: HeadFolder, target: Any, load_format: str) -> MlpSpeculator:
    """Load an MLP speculator. Raises ValueError if its tensors do not fit its config or the target."""
    config, weights = folder.config, folder.read()
    if lstm := sorted(name for name in weights if re.match(r"(forget|input|output|cell|qhead)", name)):
        raise ValueError(
            f"tensor {lstm[0]!r} of {str(folder.path)!r} is of Arctic's LSTM speculator, which is not supported; "
            "use an MLP speculator"
        )
    max_tokens, is_tied = int(config["n_predict"]), bool(config.get("tie_weights", False))
    num_stored = sum(re.fullmatch(r"emb\.\d+\.weight", name) is not None for name in weights)
    if max_tokens < 1 or (max_tokens > num_stored and not is_tied):  # before as many modules are made
        raise ValueError(
            f"n_predict={max_tokens} of {str(folder.path)!r} must be at least 1, and at most {num_stored}, the stored "
            "positions, unless they share weights"
        )
    head = MlpSpeculator(
        target,
        max_tokens,
        weights["emb.0.weight"].shape[1],
        is_tied=is_tied,
        scales_input=bool(config.get("scale_input", False)),
    )
    if is_tied:  # copies of shared tensors may be stored, too
        weights = {name: value for name, value in weights.items() if name in head.state_dict()}
    fill(head, weights, folder.path, target, load_format)
    return head


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _EPSILON)


def _at(modules: nn.ModuleList, place: int) -> Any:
    """The module of a draft position; the last one stands for all after it."""
    return modules[min(place, len(modules) - 1)]
