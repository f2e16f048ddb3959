"""Protocols of drafting heads: small networks that draft from the target's hidden states.

How a head drafts decides which proposer runs it, see `specdec.methods`:
    sequential: token by token with a cache of its own, fed with features and then with its own outputs (EAGLE, MTP);
    parallel: a sequential head that reads mask tokens to draft all tokens in one pass (P-EAGLE);
    block: all tokens of a draft in one pass with a cache of its own (DFlash);
    stateless: from the last feature alone, without a cache (Medusa, MLP speculator).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from specdec.models.base import FeatureLayers
from specdec.trees.columns import Branches
from specdec.trees.optimal import Rates

Drafting = Literal["sequential", "parallel", "block", "stateless"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Something about a head that its checkpoint does not reliably tell.

    name: what is chosen, "feature layers". readings: of each reading, by its label, the values of the head's options as
    `Head.with_options` takes them and JSON can hold them, {"2, 16, 29": {"feature_layers": [2, 16, 29]}}; that of the
    head itself is first.
    """

    name: str
    readings: Mapping[str, Mapping[str, Any]]


class Head(Protocol):
    """A head on the target's device, which shares the target's embedding and often its output head.

    format: name of its checkpoint format, which is also that of its method. drafting: how it drafts, see above.
    feature_layers: hidden states of the target that it reads, concatenated in this order.
    draft_vocabulary: int64 [n], ascending: the tokens that its logits stand for, all of them if n == vocab_size.
    rates: measured acceptance rates of siblings by level and rank, or None.
    max_tokens: the most tokens that it can draft in a step; None: any number.
    """

    format: str
    drafting: Drafting
    feature_layers: FeatureLayers
    draft_vocabulary: Tensor
    rates: Rates | None
    max_tokens: int | None

    @property
    def vocab_size(self) -> int:
        """Size of the target's vocabulary."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        ...

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a pass reads."""
        ...

    def choices(self) -> tuple[Choice, ...]:
        """What its checkpoint does not reliably tell; () if there is nothing. See `specdec.heads.convention`."""
        ...

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """A head with the same weights that is read otherwise. options: of one or more readings of `choices`.

        Not for a fused head. Raises ValueError for an option that it does not have.
        """
        ...

    def quantize(self, name: str) -> None:
        """Keep weights in fewer bits, before the head is fused. name: of `quantizers.QUANTIZERS`.

        Raises ValueError without kernels for it, and for a number of inputs that is no multiple of 32.
        """
        ...

    def fuse(self) -> None:
        """Fuse operations for decoding; a fused head can no longer be trained or saved."""
        ...


class WithoutChoices:
    """`choices` and `with_options` of a head whose checkpoint tells all, or that is trained here."""

    def choices(self) -> tuple[Choice, ...]:
        """Nothing is open."""
        return ()

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The head itself. Raises ValueError for any option."""
        if options:
            raise ValueError(
                f"options={dict(options)} must be empty, as this head has none; remove its convention.json"
            )
        return self


class SequentialHead(Head, Protocol):
    """A head that drafts token by token. Its cache position i belongs to token i + 1: the first has no feature before.

    A state is what the head reads for one position: `encode` makes it of the target's features, and `forward` returns
    the next position's, which stands in for it where the target has not computed features yet.
    """

    def allocate(self, num_slots: int, capacity: int) -> Any:
        """An empty RaggedCache."""
        ...

    def encode(self, features: Tensor) -> Tensor:
        """States [..., state width] of features [..., sum of widths of feature_layers]."""
        ...

    def forward(
        self, states: Tensor, tokens: Tensor, cache: Any, first_slot: int = 0, branches: Branches | None = None
    ) -> Tensor:
        """States of tokens, int64 [rows, width], of the states before each: [rows, width, state width] -> the same.

        Row r belongs to slot first_slot + r; the caller updates the cache's num_cached. branches: of a tree.
        """
        ...

    def forward_at(
        self,
        states: Tensor,
        tokens: Tensor,
        starts: Tensor,
        cache: Any,
        extent: int,
        branches: Branches | None = None,
    ) -> Tensor:
        """`forward` from the first slot on; row r begins at position starts[r] and attends to `extent` positions."""
        ...

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., draft vocab] of the next token, of states that `forward` returned."""
        ...


class ParallelHead(SequentialHead, Protocol):
    """A sequential head that fills in mask tokens. mask_token: their token id."""

    mask_token: int

    def mask_state(self) -> Tensor:
        """The state of a mask token, [state width]."""
        ...


class BlockHead(Head, Protocol):
    """A head that drafts a block of tokens in one pass, over a cache of what it made of the committed positions.

    Its cache position i belongs to token i, and is known once the target has computed features of it. max_tokens: the
    most tokens that one pass drafts.
    """

    max_tokens: int

    def allocate(self, num_slots: int, capacity: int) -> Any:
        """An empty RaggedCache."""
        ...

    def extend(self, features: Tensor, tokens: Tensor, cache: Any, first_slot: int = 0) -> None:
        """Enter committed positions: features [rows, width, ...] of positions, and the tokens after them.

        Row r belongs to slot first_slot + r. The caller updates the cache's num_cached.
        """
        ...

    def extend_at(self, features: Tensor, tokens: Tensor, starts: Tensor, cache: Any, extent: int) -> None:
        """`extend` from the first slot on; row r begins at position starts[r]. extent: a bound on all positions."""
        ...

    def block(self, newest: Tensor, num_tokens: int, cache: Any) -> Any:
        """One pass for num_tokens drafts after each row's newest token, int64 [rows]; returns what `logits` reads."""
        ...

    def block_at(self, newest: Tensor, num_tokens: int, starts: Tensor, cache: Any, extent: int) -> Any:
        """`block`, where the newest tokens are at positions starts, int64 [rows]. extent: a bound on all positions."""
        ...

    def logits(self, block: Any, newest: Tensor, drafted: Tensor) -> Tensor:
        """Logits [rows, 1, draft vocab] of the draft token at place i, given those before it, int64 [rows, i].

        Formats whose slots are independent given the block ignore `drafted`.
        """
        ...

    def confidence(self, block: Any, newest: Tensor, drafted: Tensor) -> Tensor | None:
        """Probability, float32 [rows], that the draft token at place i will be accepted, given those before it.

        None if the head does not tell.
        """
        ...


class StatelessHead(Head, Protocol):
    """A head that drafts from one hidden state and the tokens after it.

    A state is what it knows at a draft position. Position 0 drafts the token after the newest one.
    """

    def start(self, features: Tensor) -> Tensor:
        """States [rows, 1, width] of features [rows, 1, ...], those of the token before the newest."""
        ...

    def advance(self, place: int, states: Tensor, tokens: Tensor) -> Tensor:
        """States of draft position `place`: those of the position before, and the token before it, int64 [rows, n]."""
        ...

    def logits(self, place: int, states: Tensor) -> Tensor:
        """Logits [rows, n, draft vocab] of draft position `place` from its states [rows, n, width]."""
        ...
