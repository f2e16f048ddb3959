"""How far a model's distributions are from another's, token by token: what quantization and rounding cost.

`python -m bench.tools.faithfulness` prints it for the quantizations of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.models.base import LanguageModel
from specdec.runtime.devices import upload


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Differences between two models' distributions of the next token, over the positions of a text.

    tv: total variation, float64 [n]. kl_nats: divergence of the model from the reference, float64 [n].
    same_top: share of positions where both have the same most likely token.
    """

    tv: Tensor
    kl_nats: Tensor
    same_top: float

    @property
    def mean_tv(self) -> float:
        return float(self.tv.mean())

    @property
    def mean_kl_nats(self) -> float:
        return float(self.kl_nats.mean())


@torch.inference_mode()
def faithfulness(model: LanguageModel, reference: LanguageModel, texts: Sequence[Sequence[int]]) -> Faithfulness:
    """Compare a model with a reference after each token of the texts, at temperature 1 and without truncation.

    Raises ValueError if there is no token.
    """
    if not any(texts):
        raise ValueError(f"texts={list(texts)!r} must have tokens; give at least one")
    parts = [_compared(*(_log_probs(each, text) for each in (model, reference))) for text in texts if text]
    tv, kl_nats, same_top = (torch.cat(each) for each in zip(*parts, strict=True))
    return Faithfulness(tv, kl_nats, float(same_top.double().mean()))


def _log_probs(model: LanguageModel, text: Sequence[int]) -> Tensor:
    """float64 [tokens, vocab]"""
    logits = model.forward(upload([[*text]], model.device).view(1, -1), model.allocate(1, len(text)))
    return logits[0].double().log_softmax(-1)


def _compared(found: Tensor, expected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Total variation, divergence of the found from the expected distribution, and whether their modes are equal."""
    probs = expected.exp()
    terms = torch.where(probs > 0, probs * (expected - found), 0.0)  # a token without probability adds nothing
    kl_nats = terms.sum(-1)
    return (found.exp() - probs).abs().sum(-1) / 2, kl_nats, found.argmax(-1) == expected.argmax(-1)
