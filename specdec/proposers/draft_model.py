"""Drafts from a smaller language model, drawn token by token with the request's own sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from specdec.models.base import FixedShapeModel, LanguageModel, TreeModel, prefill
from specdec.models.vocabularies import Rewritten, SharedVocabulary
from specdec.proposers.adaptive import AdaptiveLength
from specdec.proposers.chain import ChainProposer, Pending, draw_chain
from specdec.proposers.ngram import pad
from specdec.proposers.tree import Level, LogitsAt, draw_tree
from specdec.requests import Batch, Generation
from specdec.runtime.devices import fetch_later
from specdec.sampling.randomness import UniformSource, uniforms
from specdec.trees.shape import Tree
from specdec.verification import Draft


@dataclass(slots=True)
class _Slot:
    """The content of a cache slot: num_committed of the owner's tokens, then `drafted` tokens that may be rejected."""

    owner: Generation | None = None
    num_committed: int = 0
    drafted: list[int] = field(default_factory=list)

    def num_valid(self, row: Generation, tokens: Sequence[int]) -> int:
        """The number of the row's leading tokens in the cache, such that at least one token is left to feed."""
        if self.owner is not row:
            return 0
        valid = self.num_committed
        for token in self.drafted:
            if valid >= len(tokens) or tokens[valid] != token:
                break
            valid += 1
        return min(valid, len(tokens) - 1)


class DraftModelProposer(ChainProposer):
    """A draft model with its own ragged cache.

    The cache is synchronized by comparison: a slot is valid up to its first difference from the committed tokens. This
    covers rejection (the rejected tail is overwritten), full acceptance (the last draft token was never fed, and is fed
    with the bonus token) and a reassigned slot (nothing is valid). Accepted tree nodes are not in consecutive columns:
    they are fed again, in the call that feeds the newest token.

    shared: the vocabulary shared with the target, if the model's is different; the model then reads the text re-encoded
    in its own tokens, the last of which may change as the text grows, and drafts shared tokens only.
    tree: the shape of the drafts; None draws chains.
    """

    feeds_drafts = True  # whether drafted tokens are fed while a chain is drawn
    max_pending: int | None = 2  # the newest token, and the last of a draft that was accepted as a whole

    def __init__(
        self,
        model: LanguageModel,
        uniforms: UniformSource = uniforms,
        adaptive: AdaptiveLength | None = None,
        shared: SharedVocabulary | None = None,
        tree: Tree | None = None,
    ) -> None:
        self._model, self._uniforms, self._adaptive, self._shared = model, uniforms, adaptive, shared
        self._vocabulary, self.tree = shared.tokens if shared else None, tree
        if tree:
            self.max_pending = tree.depth + 1  # accepted nodes are fed again
        self._texts: dict[Generation, Rewritten] = {}
        self._cache: Any = None
        self._slots: list[_Slot] = []
        self._fed: Tensor | None = None  # draft tokens fed by the last call, [rows, n]
        self._max_draft = 0

    @torch.inference_mode()
    def propose(self, batch: Batch, limits: Sequence[int]) -> Draft:
        texts = self._read(batch)
        limits = [
            max(0, min(limit, self._model.context_length - len(tokens)))
            for limit, (tokens, _) in zip(limits, texts, strict=True)
        ]
        if max(limits) == 0:
            return Draft.empty(len(batch.rows), batch.sampling.vocab_size, self._model.device)
        num_drafted = len(self.tree) if self.tree else max(limits)
        self._reserve(batch, max(len(tokens) for tokens, _ in texts) + num_drafted)
        self._settle()
        draft = self._draft(batch, [tokens for tokens, _ in texts], limits)
        if draft.tokens.shape[1] == 0:
            return draft  # nothing was fed
        self._fed = fetch_later(self._own(draft.tokens[:, : -1 if self.feeds_drafts and not self.tree else 0]))
        for slot, row, (tokens, num_settled) in zip(self._slots, batch.rows, texts, strict=False):
            slot.owner, slot.num_committed, slot.drafted = row, num_settled, tokens[num_settled:]
        return draft

    @property
    def is_fixed(self) -> bool:
        return self._adaptive is None and self._shared is None

    @property
    def context_length(self) -> int:
        return self._model.context_length

    def enter(self, batch: Batch, slot: int) -> list[int]:
        row = batch.rows[slot]
        assert row
        self._reserve(batch, len(row.tokens) + batch.max_draft)
        self._settle()
        self._max_draft = batch.max_draft
        return self._lacking(batch, slot, row.tokens, self.max_pending or batch.max_draft + 1)

    def inputs(self, batch: Batch) -> tuple[Any, ...]:
        return (self._cache,)

    def logits_after(self, pending: Pending, extent: int, *inputs: Any) -> Callable[[Tensor], Tensor]:
        (cache,), model = inputs, cast("FixedShapeModel", self._model)

        def logits(drafted: Tensor) -> Tensor:
            if drafted.shape[1] == 0:
                fed = model.forward_at(pending.tokens, pending.starts, cache, extent)
                return self._of_target(at(fed, pending.num - 1))
            newest, places = self._own(drafted[:, -1:]), pending.ends + drafted.shape[1] - 1
            return self._of_target(model.forward_at(newest, places, cache, extent))

        return logits

    def logits_at(self, pending: Pending, extent: int, *inputs: Any) -> LogitsAt:
        (cache,), model = inputs, cast("FixedShapeModel", self._model)

        def logits(level: Level, parents: Tensor) -> Tensor:
            if level.number == 0:
                fed = model.forward_at(pending.tokens, pending.starts, cache, extent)
                return self._of_target(at(fed, pending.num - 1))
            nodes = self._own(parents)
            return self._of_target(model.forward_at(nodes, pending.ends, cache, extent, branches=level.branches))

        return logits

    def num_pending(self, accepted: Tensor, num_tokens: int) -> Tensor:
        if self.tree:
            return accepted + 1
        return 1 + (accepted == num_tokens).long()  # the last token of a draft is not fed while drafting

    def drafted(self, slot: int, row: Generation, length: int) -> None:
        max_pending = self.max_pending or self._max_draft + 1
        self._cache.reserve(slot, [max(0, length - max_pending)], max_pending + self._max_draft)
        self._slots[slot] = _Slot(row, length)

    def _draft(self, batch: Batch, texts: Sequence[list[int]], limits: Sequence[int]) -> Draft:
        if batch.recording and not self._adaptive:
            pending = self._pending(batch, texts, self.max_pending or batch.max_draft + 1)
            return self._record(batch, limits, pending, self._cache, self._cache.num_cached[: len(batch.rows)])
        if self.tree:
            logits_at = partial(self._branch, batch, texts, self.tree.depth + 1)
            return draw_tree(batch, limits, self.tree, logits_at, self._uniforms, self._vocabulary)
        return self._drawn(batch, texts, limits)

    def _branch(self, batch: Batch, texts: Sequence[list[int]], longest: int, level: Level, parents: Tensor) -> Tensor:
        """Logits of a level's children, from the tokens of its parents."""
        if level.number == 0:
            return self._of_target(self._catch_up(batch, texts, longest))
        model = cast("TreeModel", self._model)
        return self._of_target(model.forward(self._own(parents), self._cache, branches=level.branches))

    def _read(self, batch: Batch) -> list[tuple[list[int], int]]:
        """Each row's tokens in the model's vocabulary, and the number of leading ones that can no longer change."""
        if self._shared is None:
            return [(row.tokens, len(row.tokens)) if row else ([0], 0) for row in batch.rows]
        old = self._texts
        self._texts = {row: old.get(row) or Rewritten(self._shared) for row in batch.rows if row}
        for row, text in self._texts.items():
            text.follow(row.tokens)
        # the text of a token may be empty, as for a start-of-sequence token
        read = [self._texts[row] if row else None for row in batch.rows]
        return [(text.tokens, text.num_settled) if text and text.tokens else ([0], 0) for text in read]

    def _reserve(self, batch: Batch, longest: int) -> None:
        """Ensure that the cache fits the longest row, which may have more tokens in the model's own vocabulary."""
        capacity = self._cache.capacity if self._cache else 0
        if capacity < max(batch.capacity, longest) or len(self._slots) < batch.num_slots:
            needed = longest if longest <= batch.capacity else 2 * longest
            if batch.recorder:
                needed = batch.recorder.capacity(needed)
                if self._cache:
                    batch.recorder.forget()  # recordings refer to the old cache
            self._cache = None  # free the memory before allocating
            self._cache = self._model.allocate(
                batch.num_slots, max(batch.capacity, needed), max_rollback=max(batch.max_draft, 1)
            )
            self._slots, self._fed = [_Slot() for _ in range(batch.num_slots)], None

    def _settle(self) -> None:
        """Record the tokens that the last call fed, whose transfer to the host has finished since."""
        if self._fed is not None:
            for slot, fed in zip(self._slots, self._fed.tolist(), strict=False):
                slot.drafted = slot.drafted + fed
            self._fed = None

    def _own(self, tokens: Tensor) -> Tensor:
        """Convert draft tokens to the model's own ids."""
        return self._shared.to_draft(tokens) if self._shared else tokens

    def _of_target(self, logits: Tensor) -> Tensor:
        """The model's logits of the tokens that it can draft."""
        return self._shared.of(logits) if self._shared else logits

    def _drawn(self, batch: Batch, texts: Sequence[list[int]], limits: Sequence[int]) -> Draft:
        def logits_after(drafted: Tensor) -> Tensor:
            if drafted.shape[1]:
                return self._of_target(self._feed(self._own(drafted[:, -1:])))
            return self._of_target(self._catch_up(batch, texts, max(limits) + 1))

        return draw_chain(batch, limits, logits_after, self._uniforms, self._adaptive, self._vocabulary)

    def _pending(self, batch: Batch, texts: Sequence[list[int]], longest: int) -> list[list[int]]:
        """The committed tokens that each slot lacks, at least one; if more than `longest`, feeds all but one now."""
        return [self._lacking(batch, slot, tokens, longest) for slot, tokens in enumerate(texts)]

    def _lacking(self, batch: Batch, slot: int, tokens: list[int], longest: int) -> list[int]:
        """`_pending` for one slot. tokens: the row's text in the model's vocabulary."""
        row = batch.rows[slot]
        valid = self._slots[slot].num_valid(row, tokens) if row else 0
        if not self._cache.holds(slot, valid):
            valid = 0
        self._cache.num_cached[slot] = valid
        missing = tokens[valid:]
        if row and len(missing) > 1 and (valid == 0 or len(missing) > longest):
            prefill(self._model, missing[:-1], self._cache, slot, batch.recorder, len(row.request.prompt))
            return missing[-1:]
        return missing

    def _catch_up(self, batch: Batch, texts: Sequence[list[int]], longest: int) -> Tensor:
        """Feed each row the committed tokens its slot lacks; returns the logits after the last, [rows, 1, vocab].

        longest: maximum tokens per row in the joint call; a row that lacks more is first fed alone.
        """
        pending = self._pending(batch, texts, longest)
        tokens, lengths = pad(pending, self._model.device)
        logits = self._model.forward(tokens, self._cache)
        for index, fed in enumerate(pending):
            self._cache.num_cached[index] += len(fed)
        return at(logits, lengths - 1)

    def _feed(self, tokens: Tensor) -> Tensor:
        logits = self._model.forward(tokens, self._cache)
        for index in range(len(tokens)):
            self._cache.num_cached[index] += 1
        return logits


def at(logits: Tensor, places: Tensor) -> Tensor:
    """Each row's logits at its place: [rows, width, vocab] and int64 [rows] -> [rows, 1, vocab]."""
    return logits.gather(1, places.view(-1, 1, 1).expand(-1, 1, logits.shape[-1]))
