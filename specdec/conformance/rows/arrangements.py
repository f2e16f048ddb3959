"""The ways in which the same tokens can reach a model. By row invariance, all of them give the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tokens = Sequence[int]
SIBLINGS = 2  # of each node on the accepted path of a tree
STRIDE = 8  # positions from one recomputed prefix to the next: recomputing each would take quadratic time


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt and its continuation, both non-empty token ids. Logits are compared before each continuation token."""

    prompt: Tokens
    continuation: Tokens

    @property
    def fed(self) -> Tokens:
        """The tokens of the decode steps; the logits after fed[i] predict continuation[i]."""
        return [self.prompt[-1], *self.continuation[:-1]]

    @property
    def tokens(self) -> Tokens:
        """All tokens that are fed."""
        return [*self.prompt, *self.continuation[:-1]]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a text reaches a model. The default is plain decoding: a whole prompt, then one token per step, alone.

    Attributes:
        name: its name in reports.
        width: tokens of the text per decode step, as if width - 1 draft tokens were accepted.
        num_rejected: further tokens of each step, which are wrong and rolled back.
        num_siblings: wrong tokens before each right one of a step, and after the last: the step is a token tree, whose
            accepted path is `width` tokens long.
        num_rows: texts decoded together, each in a row of its own; the text under test is in the last row.
        chunk: prompt tokens per call; None for the whole prompt.
        slot: where the prompt is cached: in a new slot, in one that held another text, or copied from another slot.
        recomputed: "no"; "whole" feeds prompt and continuation in one call; "each" starts from an empty cache at every
            STRIDE-th position.
    """

    name: str
    width: int = 1
    num_rejected: int = 0
    num_siblings: int = 0
    num_rows: int = 1
    chunk: int | None = None
    slot: Literal["new", "reused", "copied"] = "new"
    recomputed: Literal["no", "whole", "each"] = "no"

    def positions(self, length: int) -> range:
        """The continuation positions, of `length`, whose logits it has."""
        return range(0, length, STRIDE if self.recomputed == "each" else 1)


PLAIN = Arrangement("plain decoding")
WHOLE = Arrangement("prompt and output in one call", recomputed="whole")


def arrangements(num_speculative_tokens: int, num_rows: int, chunk: int) -> tuple[Arrangement, ...]:
    """The arrangements to compare with PLAIN.

    Args:
        num_speculative_tokens: k, at least 1; speculative steps have k + 1 tokens.
        num_rows: rows of a batch, at least 2.
        chunk: prompt tokens per call of a chunked prompt, at least 1.
    """
    k, some = num_speculative_tokens, num_speculative_tokens // 2
    return (
        Arrangement(f"width {k + 1}, all accepted", width=k + 1),
        Arrangement(f"width {k + 1}, {some} accepted", width=some + 1, num_rejected=k - some),
        Arrangement(f"width {k + 1}, none accepted", num_rejected=k),
        Arrangement(f"batch of {num_rows}", num_rows=num_rows),
        Arrangement(f"batch of {num_rows}, width {k + 1}", width=some + 1, num_rejected=k - some, num_rows=num_rows),
        Arrangement(f"tree, {some} accepted", width=some + 1, num_siblings=SIBLINGS),
        Arrangement(
            f"tree, {some} accepted, batch of {num_rows}", width=some + 1, num_siblings=SIBLINGS, num_rows=num_rows
        ),
        Arrangement(f"prompt in chunks of {chunk}", chunk=chunk),
        Arrangement("slot reused", slot="reused"),
        Arrangement("prompt copied from a slot", slot="copied"),
        WHOLE,
        Arrangement("no cache", recomputed="each"),
    )
