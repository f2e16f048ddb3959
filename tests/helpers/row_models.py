"""Tiny models, texts and planted bugs for tests of row invariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from helpers import tiny
from specdec.conformance.rows.arrangements import Text
from specdec.conformance.rows.run import Subject
from specdec.conformance.rows.scorers import ModelScorer, TransformersScorer, in_float64
from specdec.models.base import LanguageModel
from specdec.models.causal import CausalLM
from specdec.models.fusion import fuse

WIDE = tiny.GQA | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "max_position_embeddings": 1024}
WINDOWED = WIDE | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
Build = Callable[[torch.dtype], Any]


def build(kind: str, options: dict[str, Any]) -> Build:
    """A function that makes a random transformers model in a dtype, with the same weights in each call."""
    return lambda dtype: tiny.make(kind, options, torch.float32, "eager" if kind == "gemma2" else "sdpa").to(dtype)


def texts(num_texts: int, num_prompt: int, num_tokens: int, vocab_size: int = 61) -> list[Text]:
    """Random texts, whose prompts have num_prompt tokens and more."""
    generator = torch.Generator().manual_seed(1)

    def random(length: int) -> list[int]:
        return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

    return [Text(random(num_prompt + 5 * index), random(num_tokens)) for index in range(num_texts)]


def unfused(model: Any) -> LanguageModel:
    """With transformers' own layers."""
    return CausalLM(model)


def fused(model: Any) -> LanguageModel:
    """With the kernels of this machine."""
    fuse(model)
    return CausalLM(model)


Wrap = Callable[[Any], LanguageModel]


def subject(make: Build, wrap: Wrap, plant: Callable[[LanguageModel], LanguageModel] = lambda lm: lm) -> Subject:
    """A model as a subject. plant: puts a bug into it."""
    return Subject(
        lambda dtype: ModelScorer(plant(wrap(make(dtype)))),
        lambda dtype: TransformersScorer(make(dtype)),
        lambda dtype: TransformersScorer(in_float64(make(dtype))),
    )


def wider_window(lm: Any) -> LanguageModel:
    """A window that is one position too long."""
    lm.local = tuple(each and replace(each, size=each.size + 1) for each in lm.local)
    return lm


def unmoved_nodes(lm: Any) -> LanguageModel:
    """The accepted nodes of a tree stay where they are, behind their siblings."""
    allocate = lm.allocate

    def allocated(*args: Any, **options: Any) -> Any:
        cache = allocate(*args, **options)
        cache.keep = lambda starts, path: None
        return cache

    lm.allocate = allocated
    return lm


class _Wrapped(LanguageModel):
    """A model whose calls go through another method first."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.vocab_size, self.device = lm, lm.vocab_size, lm.device
        self.max_draft_tokens = lm.max_draft_tokens

    def check_tree(self) -> None:
        raise ValueError("these bugs are planted into chains")

    def allocate(self, *args: Any, **options: Any) -> Any:
        return self.lm.allocate(*args, **options)


class StaleRow(_Wrapped):
    """The first column of a step is not written in the last layer if it held a rejected token."""

    def __init__(self, lm: Any) -> None:
        super().__init__(lm)
        self.written: dict[int, int] = {}  # columns written since a slot was emptied, by the identity of its cache

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        start = cache.num_cached[first_slot]
        is_stale = start < self.written.get(id(cache), 0) and start > 0
        blocks = [cache.layers[-1].keys, cache.layers[-1].values] if is_stale else []
        before = [block[first_slot, :, start % block.shape[2]].clone() for block in blocks]
        logits = self.lm.forward(tokens, cache, first_slot, last_only)
        for block, old in zip(blocks, before, strict=True):
            block[first_slot, :, start % block.shape[2]] = old
        self.written[id(cache)] = start + tokens.shape[1]
        return logits


class ShiftedPosition(_Wrapped):
    """Tokens of decode steps of `width` are one position too far."""

    width = 5

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        if tokens.shape[1] != self.width or last_only:
            return self.lm.forward(tokens, cache, first_slot, last_only)
        opened = type(cache).open

        def shifted(*args, **options):
            opened(cache, *args, **options)
            cache.window.positions = cache.window.positions + 1
            return cache.window.positions

        cache.open = shifted
        try:
            return self.lm.forward(tokens, cache, first_slot, last_only)
        finally:
            del cache.open


class SmallError(_Wrapped):
    """One logit is wrong by an amount after steps of several tokens: less than the rounding of bfloat16."""

    amount = 1e-2

    def forward(self, tokens, cache, first_slot=0, last_only=False):
        logits = self.lm.forward(tokens, cache, first_slot, last_only).clone()
        if tokens.shape[1] > 1 and not last_only:
            logits[:, 1, 7] += self.amount
        return logits
