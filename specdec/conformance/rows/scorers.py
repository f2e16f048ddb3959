"""Scoring texts under an arrangement: the protocol, this library's models, and plain transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from specdec.conformance.rows.arrangements import Arrangement, Text, Tokens
from specdec.models.base import MAX_ROLLBACK, Cache, LanguageModel, TreeCache, TreeModel, hold, prefill
from specdec.runtime.devices import upload
from specdec.trees.columns import Branches


class Scorer(Protocol):
    """An engine or a model whose logits can be compared. Any object with these members can be tested."""

    vocab_size: int

    def supports(self, arrangement: Arrangement) -> bool:
        """Whether texts can be scored under an arrangement; those that are not supported are left out."""
        ...

    def score(self, texts: Sequence[Text], arrangement: Arrangement) -> Tensor:
        """Logits of the first text before each of its continuation tokens.

        texts: the text under test, and texts for the other rows of the arrangement; all continuations have the same
            length.
        Returns float [len(arrangement.positions(length)), vocab_size], on the CPU, in the dtype they were computed in.
        """
        ...


class ModelScorer:
    """A LanguageModel of this library, called as the decode loop calls it."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.vocab_size = model, model.vocab_size

    def supports(self, arrangement: Arrangement) -> bool:
        limit = MAX_ROLLBACK if self.model.max_draft_tokens is None else self.model.max_draft_tokens
        if self.model.is_encoder_decoder and (arrangement.chunk or arrangement.recomputed == "whole"):
            return False
        if arrangement.num_siblings:
            return self._scores_trees
        return max(arrangement.num_rejected, arrangement.width - 1) <= limit

    @cached_property
    def _scores_trees(self) -> bool:
        try:
            self.model.check_tree()
        except ValueError:
            return False
        return True

    @torch.inference_mode()
    def score(self, texts: Sequence[Text], arrangement: Arrangement) -> Tensor:
        if arrangement.recomputed == "each":
            return self._each(texts[0], arrangement)
        if arrangement.recomputed == "whole":
            text = texts[0]
            cache = self.model.allocate(1, len(text.tokens))
            return self.model.forward(upload([text.tokens], self.model.device), cache)[0, len(text.prompt) - 1 :].cpu()
        rows = in_rows(texts, arrangement)
        cache, walk = self._filled(rows, arrangement), self._trees if arrangement.num_siblings else self._steps
        return torch.cat([logits.cpu() for logits in walk(rows, arrangement, cache)])

    def _each(self, text: Text, arrangement: Arrangement) -> Tensor:
        """Logits of prefixes, each from an empty cache."""
        prefixes = [text.tokens[: len(text.prompt) + end] for end in arrangement.positions(len(text.continuation))]
        logits = [
            prefill(self.model, prefix, self.model.allocate(1, len(prefix)), 0, num_prompt=len(text.prompt)).flatten()
            for prefix in prefixes
        ]
        return torch.stack(logits).cpu()

    def _filled(self, rows: Sequence[Text], arrangement: Arrangement) -> Cache:
        """A cache that holds each row's prompt but for its last token, with room for its continuation."""
        num_wrong = arrangement.num_rejected + arrangement.width * arrangement.num_siblings
        longest = max(len(row.tokens) for row in rows) + num_wrong
        cache = self.model.allocate(len(rows) + (arrangement.slot == "copied"), longest)
        for slot, row in enumerate(rows):
            if arrangement.slot == "reused":
                other = [*row.tokens[::-1], *row.tokens][:longest]
                prefill(self.model, other, cache, slot, num_prompt=len(other))
                cache.num_cached[slot] = 0
            self._hold(row.prompt, cache, len(rows) if arrangement.slot == "copied" else slot, arrangement.chunk)
            if arrangement.slot == "copied" and cache.num_cached[-1]:
                cache.copy_slot(len(rows), slot, cache.num_cached[-1])
                cache.num_cached[slot], cache.num_cached[-1] = cache.num_cached[-1], 0
        return cache

    def _hold(self, prompt: Tokens, cache: Cache, slot: int, chunk: int | None) -> None:
        if chunk is None:
            hold(self.model, prompt, cache, slot)
            return
        for start in range(0, len(prompt) - 1, chunk):
            prefill(self.model, prompt[start : min(start + chunk, len(prompt) - 1)], cache, slot)

    def _steps(self, rows: Sequence[Text], arrangement: Arrangement, cache: Cache) -> Iterator[Tensor]:
        """Logits [width, vocab] of the last row, step by step."""
        for step in steps(rows, arrangement, self.vocab_size):
            width = len(step[0]) - arrangement.num_rejected
            yield self.model.forward(upload(step, self.model.device), cache)[len(rows) - 1, :width]
            _advance(cache, len(rows), width)

    def _trees(self, rows: Sequence[Text], arrangement: Arrangement, cache: Cache) -> Iterator[Tensor]:
        """As `_steps`, with each step a token tree whose accepted path is the text."""
        model, keeping, device = cast("TreeModel", self.model), cast("TreeCache", cache), self.model.device
        for start in range(0, len(rows[-1].fed), arrangement.width):
            right = [list(row.fed[start : start + arrangement.width]) for row in rows]
            path, parents = tree(len(right[0]), arrangement.num_siblings)
            tokens = [beside(own, path, 1 + len(parents), self.vocab_size) for own in right]
            logits = model.forward(upload(tokens, device), cache, branches=Branches.after_root(parents))
            yield logits[len(rows) - 1, path]
            starts = upload(list(cache.num_cached[: len(rows)]), device)
            keeping.keep(starts, upload([path] * len(rows), device))
            _advance(cache, len(rows), len(path))


def _advance(cache: Cache, num_rows: int, num_tokens: int) -> None:
    cache.num_cached[:num_rows] = [length + num_tokens for length in cache.num_cached[:num_rows]]


def tree(width: int, num_siblings: int) -> tuple[list[int], list[int]]:
    """(columns of the accepted path, parents of the nodes) of a step's tree; column 0 is the root, -1 its number.

    Each of the width - 1 nodes on the path comes after its siblings, and the last one has only wrong children.
    """
    path, parents = [0], list[int]()
    for _ in range(width - 1):
        parents += [path[-1] - 1] * (num_siblings + 1)
        path.append(len(parents))
    return path, parents + [path[-1] - 1] * num_siblings


def beside(right: Tokens, path: Sequence[int], width: int, vocab_size: int) -> list[int]:
    """The tokens of a tree's columns: those of the path, and wrong ones elsewhere."""
    at = dict(zip(path, right, strict=True))
    return [at.get(column, (right[-1] + 1 + column) % vocab_size) for column in range(width)]


def in_rows(texts: Sequence[Text], arrangement: Arrangement) -> list[Text]:
    """The texts by row: the first of them in the last row, and others before it, used again if they are too few."""
    others = texts[1:] or texts
    return [others[row % len(others)] for row in range(arrangement.num_rows - 1)] + [texts[0]]


def steps(rows: Sequence[Text], arrangement: Arrangement, vocab_size: int) -> Iterator[list[list[int]]]:
    """The tokens of each step by row: the next `width` of the text, and after them the wrong ones."""
    for start in range(0, len(rows[-1].fed), arrangement.width):
        right = [list(row.fed[start : start + arrangement.width]) for row in rows]
        yield [
            [*own, *((own[-1] + 1 + index) % vocab_size for index in range(arrangement.num_rejected))] for own in right
        ]


def in_float64(model: Any) -> Any:
    """Convert a transformers model to float64, in place, with an implementation of experts that supports it."""
    if getattr(model.config.get_text_config(decoder=True), "_experts_implementation", None):
        model.set_experts_implementation("eager")
    return model.double()


class TransformersScorer:
    """A decoder-only transformers model as it is, with transformers' own cache; a batch is padded on the left."""

    def __init__(self, model: Any) -> None:
        self.model, self.vocab_size = model, model.config.get_text_config(decoder=True).vocab_size
        parameters = inspect.signature(model.forward).parameters
        self._layers = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers}
        self._caches = {"past_key_values"} <= parameters.keys() and self._layers <= {
            "DynamicLayer",
            "DynamicSlidingWindowLayer",
        }
        self._pads = {"position_ids", "attention_mask"} <= parameters.keys()

    def supports(self, arrangement: Arrangement) -> bool:
        if arrangement.recomputed != "no":
            return True
        if arrangement.num_siblings:
            return False
        if not self._caches or arrangement.slot != "new" or (arrangement.num_rows > 1 and not self._pads):
            return False
        return arrangement.num_rejected == 0 or self._layers == {"DynamicLayer"}

    @torch.inference_mode()
    def score(self, texts: Sequence[Text], arrangement: Arrangement) -> Tensor:
        if arrangement.recomputed == "no":
            return torch.cat([*self._steps(in_rows(texts, arrangement), arrangement)]).cpu()
        text = texts[0]
        length = len(text.continuation)
        if arrangement.recomputed == "whole":
            return self._uncached(text.tokens, length).cpu()
        ends = (len(text.prompt) + end for end in arrangement.positions(length))
        return torch.cat([self._uncached(text.tokens[:end], 1) for end in ends]).cpu()

    def _uncached(self, tokens: Tokens, keep: int) -> Tensor:
        """Logits [keep, vocab] after the last `keep` tokens."""
        inputs = upload([list(tokens)], self.model.device)
        logits: Tensor = self.model(input_ids=inputs, use_cache=False, logits_to_keep=keep).logits[0, -keep:]
        return logits

    def _steps(self, rows: Sequence[Text], arrangement: Arrangement) -> Iterator[Tensor]:
        """Logits [width, vocab] of the last row, step by step."""
        cache = DynamicCache(config=self.model.config)
        longest = max(len(row.prompt) for row in rows) - 1
        padding = [longest - (len(row.prompt) - 1) for row in rows]
        prompts = [[0] * pad + list(row.prompt[:-1]) for pad, row in zip(padding, rows, strict=True)]
        for start in range(0, longest, arrangement.chunk or max(1, longest)):
            self._call([row[start : start + (arrangement.chunk or longest)] for row in prompts], cache, padding, start)
        done = longest
        for step in steps(rows, arrangement, self.vocab_size):
            width = len(step[0]) - arrangement.num_rejected
            yield self._call(step, cache, padding, done)[-1, :width]
            done += width
            if arrangement.num_rejected:
                cache.crop(-arrangement.num_rejected)

    def _call(self, tokens: list[list[int]], cache: DynamicCache, padding: Sequence[int], start: int) -> Tensor:
        """Logits [rows, width, vocab] of tokens that follow `start` others, of which each row's first are padding."""
        device, options = self.model.device, {}
        if any(padding):
            columns, pads = torch.arange(start + len(tokens[0]), device=device), upload(list(padding), device)[:, None]
            options["attention_mask"] = (columns >= pads).long()
            options["position_ids"] = (columns[start:] - pads).clamp(min=0)
        logits: Tensor = self.model(input_ids=upload(tokens, device), past_key_values=cache, **options).logits
        return logits
